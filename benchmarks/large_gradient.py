"""Z-score one gradient of more than 2^31 elements, and compare it with sums in double precision.

``python -m benchmarks.large_gradient`` needs 6 bytes for each element in half precision, because of a float32 copy, 4
in float32, and a little more.
"""

import argparse
import resource
import time

import torch

from lightning_znorm.functional import zscore_grads_

CHUNK = 2**24


def main(elements: int, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.empty(elements, dtype=dtype))  # never written to, so it takes no memory
    gradient = parameter.grad = torch.empty(elements, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    total = square = 0.0
    for chunk in gradient.split(CHUNK):
        chunk.copy_(torch.randn(len(chunk), generator=generator).mul_(0.5).add_(3))
        total += chunk.sum(dtype=torch.float64).item()
    mean = total / elements
    for chunk in gradient.split(CHUNK):
        square += (chunk.double() - mean).square_().sum().item()
    std = (square / elements) ** 0.5
    sampled = torch.cat([torch.randint(elements, (100_000,), generator=generator), torch.tensor([0, elements - 1])])
    expected = (gradient[sampled].double() - mean) / std
    start = time.perf_counter()
    zscore_grads_(parameter)
    seconds = time.perf_counter() - start
    # Relative to the value if it is above 1, which allows for one rounding to the type.
    error = ((gradient[sampled].double() - expected).abs() / expected.abs().clamp_min(1)).max().item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = elements * gradient.element_size() / 2**30
    name = str(dtype).removeprefix("torch.")
    print(f"| {elements:,} | {name} | {size:.2f} | {peak:.2f} | {seconds:.1f} | {error:.1e} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**31 + 1001)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    header = ("elements", "type", "gradient, GiB", "peak, GiB", "seconds", "largest error")
    print("| " + " | ".join(header) + " |\n|" + " --: |" * len(header))
    for name in options.dtypes:
        main(options.elements, getattr(torch, name))
