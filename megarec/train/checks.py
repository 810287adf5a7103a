"""Rules that involve more than one section of the configuration or the dataset, one small function each."""

from dataclasses import replace

from megarec.base.errors import UserError, nearest
from megarec.data.dataset import Dataset
from megarec.data.stream import StreamConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.sasrec.config import SasrecConfig
from megarec.models.shape import input_shape
from megarec.parallel.fp8.precision import is_fp8
from megarec.parallel.fp8.requirements import why_no_engine
from megarec.train.config import TrainConfig
from megarec.train.layouts import name_nearest

ALIGNMENT = 16


def check_run(config: TrainConfig, *, world: int) -> None:
    """Refuses what the configuration alone rules out, before any process group is made."""
    check_stream(config)
    check_linears(config)
    try:
        check_layout(config, world=world)
    except UserError as error:
        raise name_nearest(
            error,
            config.layout,
            lambda layout: check_layout(replace(config, layout=layout), world=world),
            world=world,
            num_layers=config.model.num_layers,
        ) from None
    check_positions(config)
    check_candidates(config)
    check_best(config)


def check_layout(config: TrainConfig, *, world: int) -> None:
    """The layout fits the ranks, the model and the stream."""
    check_heads(config)
    check_lanes(config, world=world)
    check_stages(config, world=world)
    check_pack_size(config)
    check_fp8_sizes(config)


def check_stages(config: TrainConfig, *, world: int) -> None:
    """Every stage has layers, and interleaved stages whole rounds of packs."""
    layout, layers = config.layout, config.model.num_layers
    if layout.layers_per_chunk is not None and sum(layout.layers_per_chunk) != layers:
        raise UserError(
            f"{sum(layout.layers_per_chunk)} layers in chunks, {layers} in the model",
            where="layout.layers_per_chunk",
            fix=f"The numbers must add up to {layers}",
        )
    if layers < layout.num_chunks:
        raise UserError(
            f"{layers} layers are not enough for {layout.num_chunks} chunks (pipeline x virtual)",
            where="layout.pipeline",
            fix="Lower layout.pipeline or layout.virtual, or raise model.num_layers",
        )
    packs = config.stream.lanes // layout.data(world) * config.stream.packs_per_lane
    if layout.virtual is not None and packs % layout.pipeline:
        raise UserError(
            f"{packs} packs per replica are not a multiple of {layout.pipeline} stages, as virtual stages need",
            where="layout.virtual",
            fix="Set it to null, or change stream.packs_per_lane or stream.lanes",
        )


def check_heads(config: TrainConfig) -> None:
    """Whole heads and whole channels on every rank that splits a block."""
    layout, block = config.layout, config.model.block
    in_ring = layout.context_by == "ring" and layout.context > 1
    ranks = layout.tensor * (1 if in_ring else layout.context)
    if block.num_heads % ranks:
        possible = [str(n) for n in range(1, block.num_heads + 1) if block.num_heads % n == 0]
        raise UserError(
            f"{block.num_heads} heads do not divide over {ranks} ranks",
            where="layout",
            fix=f"tensor (times context, unless context_by=ring) can be {' or '.join(possible)}",
        )
    if isinstance(config.model, SasrecConfig) and config.model.dropout and in_ring:
        raise UserError(
            "the dropout of attention probabilities is not made in a ring",
            where="layout.context_by",
            fix="Set it to heads, or model.dropout=0",
        )
    if isinstance(config.model, SasrecConfig) and config.model.block.feed_forward_width % layout.tensor:
        raise UserError(
            f"{config.model.block.feed_forward_width} channels do not divide over {layout.tensor} ranks",
            where="layout.tensor",
            fix="Change it, or model.block.feed_forward_width",
        )


def check_stream(config: TrainConfig) -> None:
    """What the stream is told by the model and by the run's seed cannot be set beside them."""
    told = {
        "tokens_per_event": ("model.token_layout", config.model.tokens_per_event),
        "prefix_tokens": ("model.prefix_fields", config.model.num_prefix_tokens),
        "keep_last_event": ("model.token_layout", config.model.keep_last_event),
        "seed": ("seed", config.seed),
    }
    for name, (key, value) in told.items():
        found = getattr(config.stream, name)
        if found not in (value, getattr(StreamConfig, name)):
            raise UserError(f"{found} would not count, {key} decides", where=f"stream.{name}", fix=f"Set {key} alone")


def check_lanes(config: TrainConfig, *, world: int) -> None:
    """Every data-parallel rank serves equally many lanes."""
    data = config.layout.data(world)
    if config.stream.lanes % data:
        raise UserError(
            f"{config.stream.lanes} lanes cannot be shared by {data} data-parallel ranks",
            where="stream.lanes",
            fix=f"Use a multiple of {data}",
        )


def check_pack_size(config: TrainConfig) -> None:
    """A pack divides evenly over ranks and into whole events."""
    unit = config.layout.tensor * config.layout.context * ALIGNMENT
    if config.stream.tokens_per_pack % unit:
        raise UserError(
            f"{config.stream.tokens_per_pack} is not a multiple of {unit}",
            where="stream.tokens_per_pack",
            fix=f"The nearest is {max(unit, round(config.stream.tokens_per_pack / unit) * unit)}",
        )
    ranks = config.layout.tensor * config.layout.context
    if config.stream.tokens_per_pack % (config.model.tokens_per_event * ranks):
        shared = f", evenly over {ranks} ranks" if ranks > 1 else ""
        raise UserError(
            f"{config.stream.tokens_per_pack} tokens are not whole events of {config.model.tokens_per_event} tokens"
            f"{shared}",
            where="stream.tokens_per_pack",
            fix=f"Use a multiple of {unit * config.model.tokens_per_event}",
        )


def check_positions(config: TrainConfig) -> None:
    """The model has a position for every event of the longest window."""
    longest = config.stream.max_history_events + int(config.model.keep_last_event)
    if config.model.max_positions < longest:
        raise UserError(
            f"windows of {longest} events do not fit {config.model.max_positions} positions",
            where="model.max_positions",
            fix="Raise it, or lower stream.max_history_events",
        )


def check_candidates(config: TrainConfig) -> None:
    """A candidate's item has a token that does not hold its feedback, and its feedback is learned."""
    if not config.stream.candidates_per_window:
        return
    if not config.model.keep_last_event:
        raise UserError(
            f"{config.model.token_layout} puts an event's item and its feedback into one token",
            where="stream.candidates_per_window",
            fix="Set model.token_layout=item_action or context_item_feedback, or no candidates",
        )
    if not config.objective.feedback_weight or config.model.feedback_heads == ():
        raise UserError(
            "candidates are asked for their feedback, but no feedback is learned",
            where="stream.candidates_per_window",
            fix="Set objective.feedback_weight and model.feedback_heads, or no candidates",
        )


def check_linears(config: TrainConfig) -> None:
    """What makes the split maps can compute in the precision, on this machine."""
    linears, precision = config.layout.linears, config.precision
    if is_fp8(precision) and linears == "megatron":
        raise UserError(
            f"{precision} needs split maps that compute in FP8, and layout.linears is megatron",
            where="precision",
            fix="Set layout.linears=te, or layout.linears=fp8_reference with precision=fp8_current",
        )
    if linears == "fp8_reference" and precision != "fp8_current":
        raise UserError(
            f"the reference knows precision=fp8_current alone, and it is {precision}",
            where="layout.linears",
            fix="Set precision=fp8_current, or layout.linears to te or megatron",
        )
    if linears != "te":
        return
    if is_fp8(precision) and config.layout.recompute != "none":
        raise UserError(
            "Transformer Engine's FP8 products are not computed again in the backward pass",
            where="layout.recompute",
            fix="Set it to none, or precision=bf16",
        )
    lacking = "the run is on the CPU" if config.device == "cpu" else why_no_engine(precision)
    if lacking:
        raise UserError(
            f"Transformer Engine cannot be used: {lacking}",
            where="layout.linears",
            fix="Set layout.linears=megatron, or fp8_reference with precision=fp8_current (see docs/fp8.md)",
        )


def check_fp8_sizes(config: TrainConfig) -> None:
    """Every side of an FP8 product is a multiple of 16, of 128 where scales belong to blocks of as many numbers."""
    if not is_fp8(config.precision):
        return
    unit = 128 if config.precision == "fp8_blockwise" else 16
    layout, model = config.layout, config.model
    sides = {
        "model.width": model.width,
        "stream.tokens_per_pack": config.stream.tokens_per_pack // (layout.tensor * layout.context),
    }
    split = {name: width // layout.tensor for name, width in model.block.split_widths(model.width).items()}
    for name, size in [*sides.items(), *split.items()]:
        if size % unit:
            raise UserError(
                f"a rank has {size} of what this sets, and {config.precision} needs a multiple of {unit}",
                where=name,
                fix="Change it, or layout.tensor or layout.context, or set precision=bf16",
            )


def check_best(config: TrainConfig) -> None:
    """The best checkpoint is known by a periodic evaluation."""
    if config.checkpoint.keep_best and not config.evaluate_every_steps:
        raise UserError(
            f"nothing measures '{config.checkpoint.keep_best}'",
            where="checkpoint.keep_best",
            fix="Set evaluate_every_steps",
        )


def check_evaluation(config: TrainConfig, dataset: Dataset) -> None:
    """The dataset can serve the protocol, and it measures what names the best."""
    if not config.evaluate_every_steps:
        return
    config.protocol.check(dataset)
    heads = input_shape(dataset.fields, config.model).feedback_heads
    known = [*config.protocol.metrics, *(f"{name}/auc" for name, num_outcomes in heads.items() if num_outcomes == 2)]
    best = config.checkpoint.keep_best
    if best and best not in known:
        raise UserError(f"no metric '{best}'", where="checkpoint.keep_best", fix=nearest(best, known))


def check_dataset(config: TrainConfig, dataset: Dataset) -> None:
    """What the model wants to know is in the dataset."""
    biased = isinstance(config.model, HstuConfig) and config.model.block.num_time_buckets > 0
    if not dataset.has_timestamps and (biased or config.model.time_gap_buckets):
        raise UserError(
            "the dataset has no timestamps",
            where=str(dataset.path),
            fix="Set model.block.num_time_buckets=0 and model.time_gap_buckets=0",
        )
