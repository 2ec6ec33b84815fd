"""The mistakes that ``tools/mutate.py`` makes, one at a time, each of which some test must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """``original`` occurs in ``file`` (below ``elastic_megatron/``) once and becomes ``mutated``."""

    law: str
    mistake: str
    file: str
    original: str
    mutated: str
    tests: str


LAW1 = "tests/blocks/test_masked_equals_sliced.py"
GRADIENTS = "tests/blocks/test_gradients.py"
EXPERTS = "tests/blocks/test_experts.py"
COUNTS = "tests/space/test_counts.py"
NESTING = "tests/space/test_nesting.py"
LANES = "tests/space/test_lanes.py"
SORTING = "tests/importance/test_sorting.py"
SCORES = "tests/importance/test_scores.py"
RUN = "tests/training/test_distillation_run.py"
RESUME = "tests/training/test_resume.py"
ROUTER = "tests/router/test_budget_router.py"
MIX = "tests/ops/test_mix.py"
STREAMS = "tests/conversion/test_streaming.py"
HF = "tests/checkpoint/test_hf.py"
RANK_GRADIENTS = "tests/parallel/test_rank_gradients.py"
RANK_TRAINING = "tests/parallel/test_training.py"
RANK_RANKING = "tests/parallel/test_ranking.py"

MUTATIONS = (
    Mutation("1", "norms keep the scale of the full width", "blocks/widths.py",
             'mix.width("hidden_size")).sqrt()', 'mix.width("hidden_size")).sqrt() * 0 + 1', LAW1),
    Mutation("1", "the norm's output is scaled the wrong way", "blocks/binding.py",
             "_scale_first(output, s.reciprocal())", "_scale_first(output, s)", LAW1),
    Mutation("1", "the embedding's cut channels stay", "blocks/stack.py",
             "hidden_states = hidden_states * mask.to(hidden_states.dtype)", "pass", LAW1),
    Mutation("1", "SSM states are masked group by group", "blocks/widths.py",
             "states.repeat(local_groups)", "states.repeat_interleave(local_groups)", LAW1),
    Mutation("1", "the convolution's bias is not masked", "blocks/mixers.py",
             "return self._masked(self.conv1d_bias_cp1)", "return self._slice_conv_param(self.conv1d_bias_cp1)", LAW1),
    Mutation("1", "the gated norm's scale is upside down", "blocks/widths.py",
             "share.rsqrt()", "share.sqrt()", LAW1),
    Mutation("1", "query heads are masked channel by channel", "blocks/widths.py",
             "heads.repeat_interleave(parent.kv_channels)", "heads.repeat(parent.kv_channels)", LAW1),
    Mutation("1", "the shared expert is not masked", "blocks/binding.py",
             'mask_input(layer.mlp.shared_experts.linear_fc2, binding, "shared")', "pass", LAW1),
    Mutation("1", "a dropped layer still writes", "blocks/widths.py",
             "write = hidden if keep is None else keep if hidden is None else hidden * keep", "write = hidden", LAW1),
    Mutation("1", "a cut expert's selection score is 0, not -inf", "blocks/mixers.py",
             'torch.where(alive, self.expert_bias, float("-inf"))', "self.expert_bias", EXPERTS),
    Mutation("1", "the auxiliary loss counts all experts", "blocks/mixers.py",
             "aux_loss = aux_loss * (kept.detach().sum() / kept.numel())", "pass", EXPERTS),
    Mutation("1", "absent experts look underloaded", "blocks/mixers.py",
             "count = _excess(count, kept > 0, self.count_unit)", "pass", EXPERTS),
    Mutation("1", "a dropped layer's experts are counted", "blocks/mixers.py",
             "count = count * keep.to(count)", "pass", EXPERTS),
    Mutation("1", "masks are prefixes of the whole, not of lanes", "ops/mix.py",
             "else space.kept(axis, width)", "else range(width)", f"{LAW1} {MIX}"),
    Mutation("2", "sorting leaves the head and the embedding as they were", "checkpoint/slice.py",
             'if "hidden_size" in orders:', 'if "hidden_size" in orders and layer is not None:', SORTING),
    Mutation("2", "sorted experts keep their old numbers", "checkpoint/slice.py",
             "name = _renumber(name, layout, expert, list(order).index(expert))", "pass", SORTING),
    Mutation("3", "in_proj forgets dt", "space/layouts.py",
             '(_dim(_Z, _X, _B, _C, _DT), _HIDDEN)', '(_dim(_Z, _X, _B, _C), _HIDDEN)', COUNTS),
    Mutation("3", "the correction bias is not counted", "space/layouts.py",
             'TensorLayout("mlp.router.expert_bias", (_dim(Segment("experts", ("num_moe_experts",))),),',
             'TensorLayout("mlp.router.expert_bias", (_dim(Segment("experts", (1,))),),', COUNTS),
    Mutation("3", "every expert is active", "cost/account.py",
             'return _params(model, "moe_router_topk")', 'return _params(model, "num_moe_experts")', COUNTS),
    Mutation("4", "lanes are dealt in blocks, not round-robin", "space/space.py",
             "for i in range(lane, size, per_group)",
             "for i in range(lane * size // per_group, (lane + 1) * size // per_group)", LANES),
    Mutation("4", "a nested space keeps the parent's layer order", "checkpoint/nested.py",
             "layer_order=[layers[i] for i in space.layer_order if i in layers]",
             "layer_order=sorted(layers[i] for i in space.layer_order if i in layers)", NESTING),
    Mutation("4", "interleaved parts are taken one after the other", "space/layouts.py",
             "positions[j // kept_share].extend(start + k for k in inner)",
             "positions[0].extend(start + k for k in inner)", "tests/space/test_layouts.py"),
    Mutation("5", "recomputation runs without widths", "blocks/stack.py",
             "local = mix.with_tensors(mix_tensors)\n",
             "local = mix.with_tensors(mix_tensors) if self._mix else mix.one_hot("
             "mix.space, mix.space.full(), hidden.device, hidden.dtype)\n", GRADIENTS),
    Mutation("5", "recomputation detaches the mix", "blocks/stack.py",
             "local = mix.with_tensors(mix_tensors)\n",
             "local = mix.with_tensors([t.detach() for t in mix_tensors])\n", GRADIENTS),
    Mutation("5", "masks carry no gradient to the router", "blocks/binding.py",
             "return None if mask is None else (args[0] * mask.to(args[0].dtype), *args[1:])",
             "return None if mask is None else (args[0] * mask.detach().to(args[0].dtype), *args[1:])", GRADIENTS),
    Mutation("5", "hard samples have no gradient", "ops/gumbel.py",
             "return one_hot + (soft - soft.detach())", "return one_hot", f"tests/ops/test_gumbel.py {ROUTER}"),
    Mutation("6", "all axes share their noise", "router/router.py",
             "gumbel_noise((*key, axis), scaled)", "gumbel_noise(key, scaled)", ROUTER),
    Mutation("6", "the router's loss is not weighted by tokens", "training/step.py",
             "self.settings.loss_weight * share * tokens", "self.settings.loss_weight * share", RUN),
    Mutation("6", "every tensor rank counts the whole gradient of the residual stream", "blocks/binding.py",
             "scale_gradient(value, 1 / self.replicas)", "value", f"{RANK_GRADIENTS} -k TP2"),
    Mutation("6", "the budget's error is counted once a tensor rank", "training/step.py",
             "1 / self.groups.tp.size()", "1.0", f"{RANK_GRADIENTS} -k TP2"),
    Mutation("6", "the router learns from its own rank only", "router/step.py",
             "        if group is not None:\n            torch.distributed.all_reduce(total, group=group)\n", "",
             f"{RANK_TRAINING} -k PP2]"),
    Mutation("6", "every data-parallel rank adds the router's gradient again", "training/step.py",
             "contribute=self.groups.dp_cp.rank() == 0", "contribute=True", f"{RANK_TRAINING} -k DP2]"),
    Mutation("6", "draws are keyed by the rank's own micro-batches", "training/batches.py",
             "(m * ranks + rank) * stage.micro_batch_size", "m * stage.micro_batch_size",
             f"{RANK_TRAINING} -k DP2]"),
    Mutation("6", "the teacher's stage gets the student's hidden states", "training/distill.py",
             "zip(models, parts, strict=True)", "zip(models, [parts[0]] * len(parts), strict=True)",
             f"{RANK_TRAINING} -k PP2]"),
    Mutation("6", "context ranks hold neighbouring chunks", "ops/parallel.py",
             "(chunks[rank], chunks[-1 - rank])", "(chunks[2 * rank], chunks[2 * rank + 1])",
             "tests/ops/test_parallel.py"),
    Mutation("6", "evaluation counts every tensor rank's tokens", "training/evaluate.py",
             "    if groups.tp.rank():\n", "    if False:\n", f"{RANK_TRAINING} -k TP2+SP]"),
    Mutation("6", "interleaved stages batch their messages", "runtime/config.py",
             '"batch_p2p_comm": not interleaved', '"batch_p2p_comm": True', f"{RANK_TRAINING} -k VPP2"),
    Mutation("6", "experts cut over ranks are scored by parts of their output", "importance/sites.py",
             "_summed(_first(output), layer.groups.expt_tp)", "_first(output)", RANK_RANKING),
    Mutation("6", "sorted parts stay in the order of their senders", "checkpoint/shards.py",
             "result[wanted.argsort(stable=True)] = received", "result[:] = received", RANK_RANKING),
    Mutation("7", "a resumed run starts with fresh optimizer moments", "training/train.py",
             "distributed.load(saved, model.chunks, optimizer=model.optimizer)",
             "distributed.load(saved, model.chunks)",
             f"{RESUME} -k exact"),
    Mutation("7", "the tracker names a checkpoint before it is there", "checkpoint/tracker.py",
             "    temporary(directory, iteration).rename(final)\n    _point(directory, iteration)\n",
             "    _point(directory, iteration)\n    temporary(directory, iteration).rename(final)\n",
             f"{RESUME} -k moment"),
    Mutation("10", "the teacher is not filled with the parent's weights", "training/build.py",
             "    chosen.fill(teacher)\n", "", RUN),
    Mutation("10", "the teacher trains along", "training/build.py",
             "return [chunk.requires_grad_(False).eval() for chunk in teacher]", "return teacher", RUN),
    Mutation("10", "forward and reverse divergence are exchanged", "ops/kd.py",
             'if kind == "forward_kl" else', 'if kind == "reverse_kl" else', "tests/ops/test_distillation.py"),
    Mutation("10", "a cut vocabulary has no common maximum", "ops/kd.py",
             "        dist.all_reduce(top, dist.ReduceOp.MAX, group)\n", "", "tests/ops/test_parallel.py"),
    Mutation("10", "a cut vocabulary has no common gradient", "ops/kd.py",
             "        dist.all_reduce(total, group=ctx.group)\n", "", "tests/ops/test_parallel.py"),
    Mutation("10", "labels are found by the rank in the world", "ops/kd.py",
             "group.rank() if", "dist.get_rank() if", "tests/ops/test_parallel.py"),
    Mutation("11", "REAP sums squared norms", "importance/reap.py",
             "dtype=dtype).double()", "dtype=dtype).double().square()", SCORES),
    Mutation("11", "experts without tokens score 0", "importance/reap.py",
             "sums / tokens.clamp_min(1), UNSEEN)", "sums / tokens.clamp_min(1), 0.0)", SCORES),
    Mutation("cost", "NVFP4 has no block scales", "cost/memory.py",
             '"nvfp4": 0.5 + 1 / 16', '"nvfp4": 0.5', "tests/cost/test_formulas.py"),
    Mutation("cost", "budgets are met from above only", "router/loss.py",
             "error = (cost - 1).abs()", "error = (cost - 1).clamp_min(0)", ROUTER),
    Mutation("copy", "tiles forget where they begin", "conversion/copy.py",
             "cut.rows[inside] - first", "cut.rows[inside]", STREAMS),
    Mutation("copy", "a tile's rows go to the beginning of the target", "conversion/copy.py",
             "        yield first, _convert(cut, rows)", "        yield 0, _convert(cut, rows)", STREAMS),
    Mutation("copy", "columns are cut like rows", "conversion/copy.py",
             "rows = _take(rows, cut.columns, 1)", "rows = _take(rows, cut.columns, 0)", STREAMS),
    Mutation("copy", "a gap is closed one row too late", "conversion/copy.py",
             "(wanted.diff() > gap + 1)", "(wanted.diff() > gap + 2)", STREAMS),
    Mutation("copy", "kept experts are taken by their new numbers", "conversion/cut.py",
             'expert = expert if kept is None else positions.of_axis("num_moe_experts", kept)[expert]',
             "expert = expert if kept is None else expert", STREAMS),
    Mutation("copy", "kept layers are taken by their new numbers", "conversion/cut.py",
             "None if target.layer is None else layers[target.layer]", "target.layer", STREAMS),
    Mutation("copy", "plain order leaves the lanes", "conversion/cut.py",
             "kept = [kept[i] for i in undeal(width, lanes, groups)]",
             "kept = [kept[i] for i in range(width)]", STREAMS),
    Mutation("copy", "q, k and v lie one after the other", "checkpoint/hf_names.py",
             "for part in range(parts) for name, rows in shares", "for name, rows in shares for part in range(parts)",
             HF),
    Mutation("copy", "experts of a stack are read from the first", "checkpoint/torch_dist_names.py",
             "(tensor.expert or 0) * rows", "0", "tests/conversion/test_torch_dist_write.py"),
    Mutation("copy", "a chunk of a column begins at its first row", "checkpoint/torch_dist.py",
             "skipped + (top - offsets[0]) * prod(sizes[1:])", "skipped", "tests/checkpoint/test_torch_dist_read.py"),
    Mutation("copy", "reading back compares nothing", "conversion/verify.py",
             "not torch.equal(_bits(found), _bits(rows))", "False", STREAMS),
    Mutation("copy", "a directory has its name from the beginning", "conversion/hf_target.py",
             'directory.parent / f".{directory.name}.incomplete"', "directory", HF),
    Mutation("copy", "a tied head is not compared with the embedding", "checkpoint/hf_read.py",
             "if not torch.equal(out, other):", "if False:", "tests/checkpoint/test_hf_errors.py"),
    Mutation("copy", "headers may promise more than the file holds", "checkpoint/safetensors_files.py",
             "    if length != end:", "    if False:", "tests/checkpoint/test_hf_errors.py"),
    Mutation("copy", "padding of the vocabulary comes along", "checkpoint/foreign.py",
             "return stated if stated and stated <= rows < stated + padding else rows", "return rows",
             "tests/checkpoint/test_foreign.py"),
)  # fmt: skip
