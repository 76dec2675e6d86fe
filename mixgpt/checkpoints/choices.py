"""The registry of save formats. Nothing here imports PyTorch."""

from mixgpt.common.registry import Choice, Registry


def not_packed(settings):
    """Return why a packed checkpoint cannot hold the run's result; empty if it can."""
    if not (settings.wbits in (4, 8) and settings.sym):
        return "supports symmetric grids of 4 or 8 bits; needs --wbits 4 or 8, and --sym"
    if settings.act_order and settings.groupsize != -1:
        return "supports groups of consecutive columns only; with --act-order needs --groupsize -1"
    return ""


FORMATS = Registry("--save-format", {
    "dense": Choice("every weight in its dtype, as by save_pretrained"),  # written by run_dir.RunDir itself
    "compressed-tensors": Choice("packed integers, which vLLM loads too",
                                 "mixgpt.checkpoints.formats:save_compressed_tensors", refuses=not_packed),
    "sparse": Choice("a bit mask and the packed values of the kept weights", "mixgpt.checkpoints.formats:save_sparse"),
})
