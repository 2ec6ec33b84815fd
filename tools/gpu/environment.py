"""Step ``environment``: what ``elastic-megatron --check`` reports, judged."""

from __future__ import annotations

from elastic_megatron.runtime import kernels
from gpu.bench import Bench

# without them no Mamba layer can be built where CUDA is
_NEEDED = {"mamba-ssm", "causal-conv1d"}


def environment(bench: Bench) -> None:
    """No package that is there may fail to import; on a GPU, Mamba's kernels must be there."""
    print(kernels.report())
    found = {kernel.name: kernels.look(kernel) for kernel in kernels.KERNELS}
    for name, finding in found.items():
        bench.says(name, " ".join(filter(None, (finding.state, finding.version, finding.reason))))
    broken = [name for name, finding in found.items() if finding.state == "does not import"]
    bench.at_most("packages that do not import", len(broken), 0)
    missing = [name for name, finding in found.items() if finding.state == "missing"]
    if bench.rehearse:
        bench.stands_in(f"torch in place of {', '.join(missing)}")
    else:
        bench.at_most("packages missing that Mamba layers need", len(_NEEDED.intersection(missing)), 0)
        bench.says("devices", kernels.devices())
