"""From Megatron-LM's arguments to a recipe: what both can say is taken from the arguments."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from ... import runtime
from ...errors import UserError
from ...recipe import Recipe, load
from ...recipe.training import Parallel, Stage

# argument -> the values under which training is what the rest of this package takes it for
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "dataloader_type": ("single", None),
    "phase_transition_iterations": (None,),
    "reset_attention_mask": (False,),
    "dataloader_inter_document_masking": (False,),
    "sft": (False,),
    "fim_data": (False,),
    "hybrid_context_parallel": (False,),
    "multiple_validation_sets": (False, None),
    "full_validation": (False,),
    "ckpt_format": ("torch_dist",),
    "use_megatron_fsdp": (False,),
    "use_torch_fsdp2": (False,),
    "init_model_with_meta_device": (False,),
    "optimizer": ("adam",),
    "perform_rl_step": (False,),
    "moe_use_upcycling": (False,),
    "fp16": (False,),
    "mtp_num_layers": (None, 0),
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """The arguments that Megatron's parser does not have."""
    group = parser.add_argument_group("elastic")
    group.add_argument(
        "--elastic-recipe", required=True, metavar="FILE",
        help="recipe whose space, budgets, router, loss, teacher and rank sections apply, and of its stages the "
        "budget probabilities; its model is the parent unless --pretrained-checkpoint names one",
    )  # fmt: skip
    group.add_argument(
        "--elastic-rank", action="store_true",
        help="an unsorted parent is ranked on the training data and sorted before the first step",
    )  # fmt: skip
    return parser


def recipe_of(args: Namespace) -> Recipe:
    """The recipe with its model, parallel and stages sections as the arguments have them.

    Raises ``UserError`` for arguments under which elastic training would not be what it says.
    """
    for name, values in _SUPPORTED.items():
        value = getattr(args, name, values[0])
        if value not in values:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, but elastic training needs {values[0]}; change the flag"
            )
    recipe = load(args.elastic_recipe)
    if not recipe.budgets:
        raise UserError(
            f"{args.elastic_recipe} has no budgets, so there is nothing to train elastically; add some"
        )
    parent = recipe.model
    if args.pretrained_checkpoint is not None:
        path = Path(args.pretrained_checkpoint).absolute()
        parent = parent.model_copy(update={"hf": None, "sizes": None, "checkpoint": path})
    return recipe.model_copy(
        update={
            "model": parent.model_copy(update={"dtype": _DTYPES[args.params_dtype]}),
            "parallel": _parallel(args),
            "stages": _stages(recipe, args),
        }
    )


def layout_of(args: Namespace) -> runtime.Layout:
    """The sizes of Megatron's process groups."""
    return runtime.Layout(
        tensor=args.tensor_model_parallel_size,
        sequence=args.sequence_parallel,
        pipeline=args.pipeline_model_parallel_size,
        virtual_pipeline=args.virtual_pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
    )


def _parallel(args: Namespace) -> Parallel:
    sharded = args.use_distributed_optimizer
    if args.bf16 and not sharded:
        raise UserError(
            "--bf16 without --use-distributed-optimizer: Megatron cannot save the fp32 parameters of a bf16 model "
            "(A_log, D, the router); add the flag"
        )
    if sharded and not args.dist_ckpt_optim_fully_reshardable:
        raise UserError(
            "--use-distributed-optimizer without --dist-ckpt-optim-fully-reshardable: Megatron cannot load the fp32 "
            "parameters that it saves (A_log, D, the router); add the flag"
        )
    return Parallel(
        **asdict(layout_of(args)),
        world_size=args.world_size,
        distributed_optimizer=sharded,
    )


def _stages(recipe: Recipe, args: Namespace) -> tuple[Stage, ...]:
    """The recipe's stages with Megatron's micro-batches, which move no draw; without any, one of all iterations."""
    iterations = args.train_iters or args.train_samples // args.global_batch_size
    if not recipe.stages:
        tokens = iterations * args.global_batch_size * args.seq_length
        return (
            Stage(
                name="pretrain",
                tokens=tokens,
                seq_length=args.seq_length,
                global_batch_size=args.global_batch_size,
                micro_batch_size=args.micro_batch_size,
            ),
        )
    if iterations > recipe.total_steps:
        raise UserError(
            f"--train-iters is {iterations}, but the recipe's stages have {recipe.total_steps} steps; raise "
            "stages[].tokens or lower the flag"
        )
    micro = args.micro_batch_size
    for index, stage in enumerate(recipe.stages):
        if stage.budgets_per_batch > 1:
            raise UserError(
                f"stages[{index}]: budgets_per_batch {stage.budgets_per_batch} needs a loop that feeds a batch several "
                "times, and Megatron-LM's feeds it once; write 1, or use elastic-megatron train"
            )
        if stage.draw_size % micro:
            raise UserError(
                f"stages[{index}]: samples_per_draw {stage.draw_size} is not a multiple of --micro-batch-size "
                f"{micro}; change one of them"
            )
    return tuple(
        s.model_copy(update={"micro_batch_size": micro, "samples_per_draw": s.draw_size})
        for s in recipe.stages
    )
