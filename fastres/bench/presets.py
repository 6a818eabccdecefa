"""Which cases a benchmark runs: ``quick``, ``standard`` and ``full``, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..perf.timing import Method
from .baselines import BASELINES, CHEAP, STANDARD

FAMILY = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
COUSINS = ("resnext50_32x4d", "wide_resnet50_2")
BATCHES = (1, 8, 32, 128, 256)
SIZES = (160, 288, 384)
AUTOTUNED = ("cuDNN fused", "max-autotune")
PRODUCTS = {"tf32": "TF32", "ieee": "IEEE fp32"}
"""Names of dtypes that are float32 with its products made in one way, whatever torch's flags."""


@dataclass(frozen=True)
class Spec:
    """One case to measure.

    Attributes:
        dtypes: names; empty for what is fast on the device.
        baselines: names out of :data:`fastres.bench.baselines.BASELINES`.
        probes: seconds per contender for the latency of single calls, with which comes memory;
            0 leaves them out.
        sustained: with the probes, also throughput without a pause.
        layers: also every step by itself.
        products: how all contenders multiply float32, of :data:`PRODUCTS`; empty for what torch's
            flags say.
        cold_cache: the caches are emptied before each call.
    """

    model: str
    batch: int
    size: int = 224
    dtypes: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    probes: float = 0.0
    layers: bool = False
    sustained: bool = False
    products: str = ""
    cold_cache: bool = False

    @property
    def form(self) -> str:
        """What sets the case apart from the usual one of its network and batch."""
        return ", ".join(
            filter(None, (PRODUCTS.get(self.products), "cold caches" * self.cold_cache))
        )

    @property
    def title(self) -> str:
        """For people."""
        title = f"{self.model}, batch {self.batch}, {self.size}x{self.size}"
        return f"{title}, {self.form}" if self.form else title

    def by_products(self) -> Iterator[Spec]:
        """A case for each way of multiplying float32 that the dtypes name: flags are global."""
        plain = tuple(name for name in self.dtypes if name not in PRODUCTS)
        if plain or not self.dtypes:
            yield replace(self, dtypes=plain)
        for name in self.dtypes:
            if name in PRODUCTS:
                yield replace(self, dtypes=("float32",), products=name)


@dataclass(frozen=True)
class Preset:
    """Cases in order, how long each is measured, and whether processes are started cold."""

    specs: tuple[Spec, ...]
    method: Method
    cold: bool = False


def preset(name: str, device: str) -> Preset:
    """The preset of a name for ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: for another name than quick, standard or full.
    """
    makers = {"quick": _quick, "standard": _standard, "full": _full}
    if name not in makers:
        raise ValueError(f"preset must be one of {', '.join(makers)}; got {name!r}")
    return makers[name](device)


def _quick(device: str) -> Preset:
    """Under a minute."""
    cuda = device == "cuda"
    model, batches = ("resnet50", (1, 32)) if cuda else ("resnet18", (1, 4))
    specs = tuple(Spec(model, b, baselines=CHEAP, probes=0.4, layers=b == 1) for b in batches)
    return Preset(specs, Method(rounds=8, budget=4.0, sample=0.02, warmup=0.1))


def _standard(device: str) -> Preset:
    """Under eight minutes on a GPU, under six on two cores of a CPU."""
    if device == "cuda":
        return Preset(tuple(_standard_gpu()), Method(rounds=20, budget=8.0), cold=True)
    specs = (
        Spec("resnet50", 1, baselines=STANDARD, probes=1.0, layers=True, sustained=True),
        Spec("resnet50", 8, baselines=CHEAP, probes=1.0, layers=True, sustained=True),
        Spec("resnet18", 1, baselines=CHEAP, probes=1.0),
        Spec("resnet18", 8, baselines=CHEAP, probes=1.0),
        Spec("resnet50", 1, size=32),
    )
    return Preset(specs, Method(rounds=12, budget=15.0), cold=True)


def _standard_gpu() -> Iterator[Spec]:
    for batch in BATCHES:
        edge = batch in (1, 256)
        yield Spec("resnet50", batch, baselines=STANDARD, probes=1.0, layers=edge, sustained=True)
    yield Spec("resnet50", 1, baselines=("cuDNN fused",), cold_cache=True)
    yield Spec("resnet50", 32, dtypes=("tf32",), baselines=("cuDNN fused",))
    for model in FAMILY:
        if model != "resnet50":
            yield from (Spec(model, batch, baselines=("cuDNN fused",)) for batch in (1, 256))
    yield Spec("resnet50", 1, size=32)
    # Last, since it may take its whole time limit.
    yield from (Spec("resnet50", batch, baselines=AUTOTUNED) for batch in (1, 256))


def _full(device: str) -> Preset:
    cuda = device == "cuda"
    dtypes = ("float16", "bfloat16", "tf32", "ieee") if cuda else ("float32", "bfloat16", "int8")
    batches = BATCHES if cuda else (1, 8, 32)
    everything = tuple(BASELINES)
    specs = [
        Spec(model, batch, 224, dtypes, everything, probes=5.0, layers=True, sustained=True)
        for model in (*FAMILY, *COUSINS)
        for batch in batches
    ]
    specs += [
        Spec("resnet50", batch, size, dtypes, STANDARD, probes=5.0)
        for size in SIZES
        for batch in batches
    ]
    specs.append(Spec("resnet50", 1, baselines=STANDARD, cold_cache=True))
    return Preset(tuple(specs), Method(), cold=True)
