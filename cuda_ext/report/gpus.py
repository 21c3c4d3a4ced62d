"""GPUs as the estimates see them: every constant of the model, with where it is from.

Multiprocessors, clocks, bandwidths and rates: NVIDIA's data sheets and white papers (Turing TU102/TU104, Ampere GA100,
Ada AD102, Hopper GH100). Latencies in cycles: T4 from Jia et al. 2019, "Dissecting the NVidia Turing T4 GPU via
microbenchmarking"; the others from Luo et al. 2024, "Benchmarking and dissecting the Nvidia Hopper GPU architecture via
microbenchmarking", as remembered and rounded. What a launch costs is an assumption of ours, until a GPU tells.
"""

from dataclasses import dataclass

from cuda_ext.report.occupancy import ADA, AMPERE, HOPPER, TURING, Limits


@dataclass(frozen=True)
class Gpu:
    """`architecture`: what ptxas compiles for; `ptx`: whose PTX is counted (sources differ between 75, 80, 90a)."""

    name: str
    architecture: str
    ptx: str
    limits: Limits
    clock: float  # Hz, boost
    dram: float  # bytes a second that a large copy reaches: 90 % of the data sheet's
    l2: float  # bytes a second
    tensor: float  # FP16 operations with FP32 sums a second that mma.sync reaches
    load_cycles: tuple[int, int, int]  # DRAM, L2, L1
    gap: float  # seconds from a kernel's end to the next one's first instruction, within a graph
    dependent_gap: float | None  # the same under programmatic dependent launch; None: there is none


GPUS = (
    Gpu(
        "H100 SXM", "90a", "90a", HOPPER, 1.755e9, 0.9 * 3.35e12, 5.5e12, 0.62 * 989e12, (480, 260, 33), 1.0e-6, 0.5e-6
    ),
    Gpu("A100 SXM 80 GB", "80", "80", AMPERE, 1.41e9, 0.9 * 2.04e12, 4.0e12, 312e12, (466, 200, 33), 1.0e-6, None),
    Gpu("RTX 4090", "89", "80", ADA, 2.52e9, 0.9 * 1.008e12, 5.0e12, 165e12, (541, 273, 33), 1.0e-6, None),
    Gpu("T4", "75", "75", TURING, 1.59e9, 0.9 * 320e9, 1.27e12, 65e12, (434, 188, 32), 1.5e-6, None),
)
"""mma.sync reaches about 62 % of the H100's rate: the rest is for wgmma (Luo et al. 2024)."""
