"""The three subjects of a report on one GPU: a token by graph, a token by the persistent kernel, and a prefill."""

from collections.abc import Callable
from dataclasses import dataclass

from cuda_ext.errors import CudaExtError
from cuda_ext.packing import Shape
from cuda_ext.report import counted, useful
from cuda_ext.report.compiled import Resources, plain, resources
from cuda_ext.report.counted import Launch
from cuda_ext.report.estimate import Estimate, estimate, floor
from cuda_ext.report.gpus import Gpu
from cuda_ext.report.useful import Operation


@dataclass(frozen=True)
class Row:
    """Launches that are alike: `count` of them."""

    operation: Operation
    count: int
    launch: Launch
    resources: Resources
    estimate: Estimate
    floor: float

    @property
    def seconds(self) -> float:
        return self.count * self.estimate.seconds

    @property
    def excess(self) -> float:
        """Seconds over the floor: what there is to gain."""
        return self.seconds - self.count * self.floor


@dataclass(frozen=True)
class Subject:
    name: str
    gpu: Gpu
    rows: tuple[Row, ...]

    @property
    def launches(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def floor(self) -> float:
        return sum(row.count * row.floor for row in self.rows)

    @property
    def bytes_from_dram(self) -> int:
        return sum(row.count * row.launch.bytes_cold for row in self.rows)

    @property
    def useful_bytes(self) -> int:
        """Weights, keys and values."""
        return sum(row.count * row.operation.fixed for row in self.rows)

    def first_to_look_at(self, count: int = 3) -> list[Row]:
        return sorted(self.rows, key=lambda row: -row.excess)[:count]


GRAPH, PERSISTENT, PREFILL = "a token by graph", "a token by the persistent kernel", "prefill"


def subjects(shape: Shape, batch: int, context: int, gpu: Gpu, tell: Callable[[str], None]) -> list[Subject]:
    """Runs every kernel on the interpreter; one layer stands for all with as many heads. Raises CudaExtError."""
    by_name = resources(gpu.architecture, tell)
    few, repeats = counted.distinct(shape), counted.repeats(shape)
    found = []
    with counted.kernels_of(gpu.ptx):
        tell(f"{gpu.name}: {GRAPH}")
        launches = counted.decode_launches(few, batch, context, gpu)
        operations = useful.decode(few, batch, context)
        found.append(_subject(GRAPH, gpu, launches, operations, repeats, by_name, dependent=True))
        tell(f"{gpu.name}: {PERSISTENT}")
        whole = counted.persistent_launch(shape, batch, context, gpu)
        if whole is not None:
            operation = _together(useful.decode(shape, batch, context))
            found.append(_subject(PERSISTENT, gpu, [whole], [operation], [], by_name, dependent=False))
        tell(f"{gpu.name}: {PREFILL} {batch} x {context}")
        launches = counted.prefill_launches(few, batch, context, gpu)
        operations = useful.prefill(few, batch, context)
        found.append(_subject(PREFILL, gpu, launches, operations, repeats, by_name, dependent=False))
    return found


def _together(operations: list[Operation]) -> Operation:
    return Operation(
        "all of a token", None, sum(o.fixed for o in operations), sum(o.activations for o in operations),
        sum(o.operations for o in operations),
    )  # fmt: skip


def _subject(
    name: str, gpu: Gpu, launches: list[Launch], operations: list[Operation], repeats: list[int],
    by_name: dict[str, Resources], *, dependent: bool,
) -> Subject:  # fmt: skip
    if len(launches) != len(operations):
        titles = ", ".join(launch.title for launch in launches)
        raise CudaExtError(f"{name}: {len(operations)} launches are known (report/useful.py), these came: {titles}")
    rows = []
    for launch, operation in zip(launches, operations, strict=True):
        of_kernel = by_name[plain(launch.kernel)]
        follows = dependent and launch.kinds["wait"][0] > 0  # has a griddepcontrol.wait
        count = 1 if operation.layer is None else repeats[operation.layer]
        guess = estimate(launch, of_kernel, gpu, dependent=follows)
        rows.append(Row(operation, count, launch, of_kernel, guess, floor(operation, gpu)))
    return Subject(name, gpu, tuple(rows))
