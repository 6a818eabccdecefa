"""Baselines: each is listed with its reason or right, faults turn the gate red, runs go on."""

import itertools
import json
import signal
import sys
import time
import types

import pytest
import torch

from fastres import cli
from fastres.backends.select import AtenOps, CudnnOps, conv_precision, matmul_precision
from fastres.bench import baselines, presets, probes, run
from fastres.bench.accuracy import random_images
from fastres.bench.baselines import BASELINES, Baseline, FasterOfTwo, Lazy, Unavailable, time_limit
from fastres.bench.presets import Spec
from fastres.bench.report import started
from fastres.bench.run import compare
from fastres.errors import UnknownModelError
from fastres.frontends.optimize import optimize
from fastres.graph.ir import Conv2d
from fastres.models.registry import list_models
from fastres.perf.roofline import Ceilings, roofline
from fastres.perf.timing import Method

BRIEF = Method(rounds=1, budget=0, sample=0, warmup=0)
FP32 = [torch.float32]


@pytest.fixture(scope="module")
def images():
    return random_images(2, 3, 64)


def test_the_baselines_of_each_device():
    """The list that users were promised; a name that vanishes would vanish from reports."""
    meant = {
        "cuda": {"folded", "cuDNN fused", "compile CUDA graphs", "max-autotune", "TensorRT"}
        | {"onnxruntime"},
        "cpu": {"folded", "inductor freezing", "max-autotune", "zentorch", "onnxruntime"}
        | {"OpenVINO"},
    }
    for device, names in meant.items():
        assert {n for n, b in BASELINES.items() if device in b.devices} == names


def test_a_missing_package_is_listed_with_its_reason_and_the_rest_is_timed(
    model, images, monkeypatch
):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    names = ("folded", "onnxruntime", "OpenVINO", "TensorRT")
    case = compare("rn18", model, images, FP32, "random", BRIEF, None, names)
    assert case.comparison.failures == {
        "onnxruntime fp32": "Unavailable: onnxruntime is not installed",
        "OpenVINO fp32": "Unavailable: openvino is not installed",
    }
    assert case.comparison["folded fp32"].seconds
    assert case.errors["folded fp32"].rms > 0


def test_a_plug_in_that_cannot_serve_says_why(model, images, monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "zentorch", None)
    with pytest.raises(Unavailable, match="zentorch does not import beside torch 2.*: .*halted"):
        BASELINES["zentorch"].build(model, torch.float32, images[0])
    monkeypatch.setitem(sys.modules, "zentorch", types.SimpleNamespace(__version__="9.9"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(Unavailable, match="9.9 leaves graphs as they are without AVX-512"):
        BASELINES["zentorch"].build(model, torch.float32, images[0])


def test_openvino_is_not_timed_in_a_type_that_it_would_compute_in_float32(
    model, images, monkeypatch
):
    core = types.SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    openvino = types.SimpleNamespace(Core=lambda: core)
    monkeypatch.setattr(baselines, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    with pytest.raises(Unavailable, match="OpenVINO has no BF16 on this processor"):
        BASELINES["OpenVINO"].build(model, torch.bfloat16, images[0])


def test_half_precision_that_a_runtime_lacks_is_a_reason(model, images):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(Unavailable, match="no bf16 convolution for CPUExecutionProvider"):
        BASELINES["onnxruntime"].build(model, torch.bfloat16, images[0])


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "inductor freezing"])
def test_other_compilers_are_right_in_float32(model, images, name):
    pytest.importorskip("onnxscript")
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    case = compare("rn18", model, images, FP32, "random", BRIEF, None, (name,))
    assert case.comparison.failures == {}
    assert case.errors[f"{name} fp32"].rms <= case.errors[f"{name} fp32"].allowed_rms


def wrong_bias(model, dtype, example):
    class Forgetful(AtenOps):
        def prepare(self, op, weights):
            weight, bias = super().prepare(op, weights)
            return weight, None if isinstance(op, Conv2d) and op.in_channels == 128 else bias

    executor = baselines._executor(model, dtype, Forgetful())
    return lambda x: executor.run([x.to(dtype)])


def stale_graph(model, dtype, example):
    kept = []
    twin = baselines.eager(model, dtype, torch.channels_last)

    def replay(x):
        kept.append(twin(x) if not kept else kept[0])
        return kept[0]

    return replay


@pytest.mark.parametrize("fault", [wrong_bias, stale_graph])
def test_an_injected_fault_gets_no_time(model, images, monkeypatch, fault):
    faulty = Baseline("faulty", "a bug", ("cpu",), fault)
    monkeypatch.setattr(baselines, "BASELINES", {"faulty": faulty})
    case = compare("rn18", model, images, FP32, "random", BRIEF, None, ("faulty",))
    assert "wrong output: RMS error" in case.comparison.failures["faulty fp32"]
    assert not case.comparison["faulty fp32"].seconds
    assert case.comparison["fastres fp32"].seconds


def test_a_build_that_takes_too_long_is_cut_off_and_the_alarm_restored():
    before = signal.getsignal(signal.SIGALRM)
    slow = Baseline("slow", "", ("cpu",), lambda *_: time.sleep(30), limit=0.05)
    begun = time.perf_counter()
    with pytest.raises(Unavailable, match=r"slow was not ready after 0\.05 s"):
        slow.contender(None, torch.float32, None)(None)
    assert time.perf_counter() - begun < 10
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with time_limit(30, "quick"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_contender_is_built_once_at_its_first_call():
    built = []
    lazy = Lazy(lambda: built.append(1) or (lambda x: x + 1))
    assert not built
    assert (lazy(1), lazy(2), built) == (2, 3, [1])


@pytest.mark.parametrize("fused_wins", [True, False])
def test_each_layer_takes_the_faster_of_fused_and_unfused(monkeypatch, fused_wins):
    taken = []
    times = [1.0, 2.0] if fused_wins else [2.0, 1.0]
    counter = iter(range(10))
    monkeypatch.setattr(baselines, "_seconds", lambda call: times[next(counter)])
    monkeypatch.setattr(CudnnOps, "conv", lambda *a: taken.append("fused"))
    monkeypatch.setattr(AtenOps, "conv", lambda *a: taken.append("plain"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ops = FasterOfTwo()
    op = create_conv()
    for _ in range(2):  # measured once, then remembered
        ops.conv(op, None, torch.ones(1, 3, 8, 8), None, False)
    assert taken == ["fused" if fused_wins else "plain"] * 2
    assert next(counter) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="was not timed before the graph's capture"):
        ops.conv(op, None, torch.ones(2, 3, 8, 8), None, False)


def create_conv():
    from fastres.graph import fold, plan, trace

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    return plan.build(fold.fold(trace.trace(net))).steps[0].op


def test_an_unknown_baseline_names_the_known_ones():
    with pytest.raises(ValueError, match=r"baselines must be of folded, .*; got 'magic'"):
        run.benchmark(["resnet18"], baselines=["magic"])


def test_one_lost_case_does_not_lose_the_others(monkeypatch, tmp_path):
    def compare_or_run_out(name, model, images, *args):
        if len(images[0]) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return compare(name, model, images, FP32, "random", BRIEF)

    monkeypatch.setattr(run, "compare", compare_or_run_out)
    specs = [Spec("resnet20", 4, 32), Spec("resnet5", 1, 32), Spec("resnet20", 1, 32)]
    path = tmp_path / "new" / "run.jsonl"
    report = run.run(specs, method=BRIEF, on_case=started(path))
    assert [case.shape[0] for case in report.cases] == [1]
    assert [check.detail for check in report.checks] == [
        "not measured: OutOfMemoryError: CUDA out of memory",
        "not measured: unknown model 'resnet5'; did you mean resnet56, resnet50, resnet152?",
    ]
    head, case = map(json.loads, path.read_text().splitlines())
    assert head["schema"] == "fastres.report.lines"
    assert head["environment"]["versions"]["torch"]
    assert case == json.loads(report.to_json())["cases"][0]
    with pytest.raises(UnknownModelError):
        run.run([Spec("resnet5", 1, 32)], method=BRIEF)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_presets_name_what_exists(name, device):
    chosen = presets.preset(name, device)
    assert chosen.specs
    for spec in chosen.specs:
        for part in spec.by_products():
            run._check_spec(part, torch.device(device))
        assert spec.model in list_models()


def test_a_way_of_multiplying_float32_is_a_case_of_its_own():
    spec = presets.Spec("resnet18", 2, dtypes=("tf32", "float16", "ieee"))
    parts = list(spec.by_products())
    assert [(p.dtypes, p.products) for p in parts] == [
        (("float16",), ""),
        (("float32",), "tf32"),
        (("float32",), "ieee"),
    ]
    assert [p.title for p in parts] == [
        "resnet18, batch 2, 224x224",
        "resnet18, batch 2, 224x224, TF32",
        "resnet18, batch 2, 224x224, IEEE fp32",
    ]
    assert list(presets.Spec("resnet18", 2).by_products()) == [presets.Spec("resnet18", 2)]


@pytest.mark.parametrize("kind", ["tf32", "ieee"])
def test_products_are_set_for_a_case_and_put_back(kind):
    before = (conv_precision(), matmul_precision())
    with run.float32_products(kind):
        assert (conv_precision(), matmul_precision()) == (kind, kind)
    assert (conv_precision(), matmul_precision()) == before
    with run.float32_products(""):
        assert (conv_precision(), matmul_precision()) == before


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="dtype 'tf32' needs a CUDA device, got 'cpu'"):
        run.benchmark(["resnet18"], dtypes=["tf32"], device="cpu")


def test_max_autotune_runs_last_for_two_batches_of_one_network():
    specs = presets.preset("standard", "cuda").specs
    tuned = [i for i, spec in enumerate(specs) if "max-autotune" in spec.baselines]
    assert tuned == [len(specs) - 2, len(specs) - 1]
    assert [(specs[i].model, specs[i].batch) for i in tuned] == [("resnet50", 1), ("resnet50", 256)]


def test_latency_quantiles_and_memory_of_a_known_call():
    pauses = itertools.cycle([0.02] + [0.0] * (probes.BLOCK - 1))
    x = torch.ones(1, 3, 8, 8)

    def call(x):
        time.sleep(next(pauses))
        return torch.ones(1_000_000) * 2

    found = probes.probe({"known": call, "OpenVINO fp32": lambda x: x}, [x], budget=0.3)
    known = found["known"]
    assert known.p50 < 0.02 <= known.p99
    assert known.calls >= probes.BLOCK
    # One vector of four million bytes and its double; the allocator rounds up a little.
    assert 8_000_000 <= known.peak_bytes <= 8_001_024
    assert found["OpenVINO fp32"].peak_bytes is None


def test_pythons_own_seconds_are_those_of_a_call_without_its_operators(model, monkeypatch):
    x = torch.randn(1, 3, 32, 32)
    fast = optimize(model, example_input=x)
    ops, done = fast.executor().ops, []
    conv = ops.conv

    def slow(*arguments):
        done.append(time.sleep(0.02))
        return conv(*arguments)

    monkeypatch.setattr(ops, "conv", slow, raising=False)
    with torch.inference_mode():
        right = fast(x)
        counted = len(done)
        seconds = probes.python_seconds(fast, x, calls=20)
        assert len(done) == 2 * counted  # once more, to have results to hand out
        assert 0 < seconds < 0.02 * counted
        assert fast.executor().ops is ops
        assert torch.equal(fast(x), right)


def test_every_step_is_timed_beside_its_floor(model, images):
    ceilings = Ceilings("slow on purpose", 1e6, 1e6)
    with torch.inference_mode():
        before = model.conv1.weight.clone()
        steps = probes.layers(model, torch.float32, images[0], ceilings)
        assert torch.equal(before, model.conv1.weight)
    costs = roofline(model, images[0].shape, itemsize=4, ceilings=ceilings).kernels
    assert [s.name for s in steps] == [c.name for c in costs]
    assert [s.floor for s in steps] == [c.seconds for c in costs]
    assert all(0 < s.seconds < 60 and s.share == s.floor / s.seconds for s in steps)


def test_cold_starts_are_measured_in_a_process_of_their_own():
    failed = probes._cold_start("x", "empty", "raise SystemExit('no luck')", {}, 60)
    assert failed.seconds is None
    assert failed.failure == "exit status 1: no luck"
    slow = probes._cold_start("x", "empty", "import time; time.sleep(60)", {}, 0.2)
    assert slow.failure == "no answer after 0.2 s"
    right = probes._cold_start("x", "filled", "import os; assert os.environ['A']", {"A": "1"}, 60)
    assert right.seconds > 0


def test_the_command_takes_networks_or_one_preset(capsys):
    for arguments in (["bench"], ["bench", "resnet18", "--quick"], ["bench", "--quick", "--full"]):
        assert cli.run(arguments) == 2
        assert capsys.readouterr().err == (
            "error: give either networks or one of --quick, --standard, --full\n"
        )


def test_the_roofline_command_gives_the_floors_without_a_gpu(capsys):
    assert cli.run(["roofline", "resnet50", "--batch", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # The table of floors worked out by hand: 60.2 thousand images/s, to 1 %.
    rate = found["epilogue per convolution"]["images_per_second"]
    assert rate == pytest.approx(60_200, rel=0.01)
    assert cli.run(["roofline", "resnet18"]) == 0
    assert "images/s at most" in capsys.readouterr().out
