"""Several gradient methods on the same parameters: allowed, and said."""

from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_znorm.gradients.places import Place
from lightning_znorm.gradients.selection import ParameterFilter


def warn_of_overlap(
    name: str, choice: ParameterFilter, earlier: Iterable[tuple[str, ParameterFilter]], places: Iterable[Place]
) -> None:
    """Warns if gradients are going to be transformed twice.

    Args:
        name: Of a callback.
        choice: Which parameters take part in it.
        earlier: Name and choice of those that come before it in the list.
        places: Of all parameters.
    """
    chosen = [place for place in places if choice.matches(place)]
    for other, others_choice in earlier:
        if shared := [place.names[0] for place in chosen if others_choice.matches(place)]:
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            rank_zero_warn(
                f"{name} transforms what {other}, before it in the list of callbacks, has made of the gradients of "
                f"{shared[0]}{more}: the result is neither method's. To compare them, use one at a time."
            )
