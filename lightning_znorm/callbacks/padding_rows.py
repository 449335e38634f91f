"""The padding rows of embeddings, whose gradients are zero."""

from collections.abc import Iterable, Iterator

from torch import nn

from lightning_znorm.gradients.slots import GradientSlot, clean_name


def with_padding_row(module: nn.Module, slots: Iterable[GradientSlot]) -> Iterator[tuple[str, int]]:
    """Yield the weights that have a padding row and train, and the number of that row.

    Such a weight belongs to a layer with ``padding_idx``, as ``Embedding`` and ``EmbeddingBag`` have it. One that a
    layer without it shares, such as the output layer of a language model, is left out: its row trains anyway.

    Args:
        module: The model.
        slots: Those of its parameters that are asked about.
    """
    layers = {
        clean_name(f"{name}.weight" if name else "weight"): layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if getattr(layer, "weight", None) is not None
    }
    for slot in slots:
        numbers = {getattr(layers.get(name), "padding_idx", None) for name in slot.names}
        number = numbers.pop() if len(numbers) == 1 else None
        if type(number) is int and getattr(layers[slot.names[0]].weight, "requires_grad", True):
            yield slot.names[0], number
