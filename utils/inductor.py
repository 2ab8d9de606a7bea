"""Reductions that keep a whole row in registers, in what torch.compile writes for a GPU."""

from functools import partial

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

TORCHS_ROW, ROW = 2**10, 2**14  # numbers: what torch keeps in registers, and what 512 threads hold, 32 each


class WholeRows(InductorChoices):
    """torch's own choices but for reductions in what is compiled with the option split_reductions=False.

    There a row of up to ROW numbers is read once. Without, a LayerNorm of 3072 channels with 8 bits behind it goes
    through memory three times, and a GELU is computed twice. Shorter rows are torch's: several a program may not fit.
    """

    @staticmethod
    def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
        at_most = partial(V.graph.sizevars.statically_known_leq, features.reduction_numel)
        if config.split_reductions or cooperative_reduction or at_most(TORCHS_ROW):
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
        return at_most(ROW)


def keep_rows_in_registers() -> dict[str, bool]:
    """Let graphs that are compiled with the returned options, from now on and in this thread, use WholeRows."""
    V.set_choices_handler(WholeRows())
    return {"split_reductions": False}
