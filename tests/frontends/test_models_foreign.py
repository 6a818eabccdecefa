"""Models and checkpoints of other libraries, and their users' tools, on fastres' networks."""

import copy

import pytest
import timm
import torch
import torchvision
from fused import executions
from helpers import adversarial_, real_images
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode
from tutorials import MnistResNet18, batch_norm_by_hand

import fastres
from fastres.errors import CheckpointError, FoldError

SHALLOW = [1, 1, 1, 1]  # blocks a stage: half of a ResNet-18


@pytest.fixture
def images():
    return real_images(2, 64).double()


def twins():
    """fastres' network and torchvision's with the same adversarial weights, in float64."""
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, SHALLOW)
    theirs = adversarial_(theirs).double()
    ours = fastres.ResNet(fastres.BasicBlock, SHALLOW).double().eval()
    ours.load_state_dict(theirs.state_dict())
    same_eps_(ours, theirs)
    return ours, theirs


def same_eps_(model, other):
    norms = [[m for m in net.modules() if hasattr(m, "eps")] for net in (model, other)]
    for ours, theirs in zip(*norms, strict=True):
        ours.eps = theirs.eps


class TestFolding:
    def test_batch_norm_step_by_step(self, images):
        """The four steps of the theory, and the fold, on one layer."""
        conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        model = adversarial_(nn.Sequential(conv, norm)).double()
        with torch.no_grad():
            by_hand = batch_norm_by_hand(
                conv(images), norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
            )
        fast = fastres.optimize(model, verify=False)
        torch.testing.assert_close(fast(images), by_hand, rtol=1e-12, atol=1e-12)
        assert len(fast.plan().steps) == 1

    def test_sync_batch_norm(self, images):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(MnistResNet18(in_channels=3, width=16))
        model = adversarial_(model).double()
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        fast = fastres.optimize(model, example_input=images)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images))
        assert len(fast.plan().steps) == 24

    @pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish, None])
    def test_batch_norm_act(self, images, act):
        layers = nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=act, apply_act=act is not None)
        model = adversarial_(nn.Sequential(*layers)).double()
        fast = fastres.optimize(model, example_input=images)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images))
        assert len(fast.plan().steps) == (2 if act is nn.Hardswish else 1)
        left = [why for _, why in fast.plan().fallbacks]
        assert left == (["Hardswish is not fused"] if act is nn.Hardswish else [])

    @pytest.mark.parametrize("convert", [convert_sync_batchnorm, freeze_batch_norm_2d])
    def test_batch_norm_act_synchronised_or_frozen(self, images, convert):
        layers = nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 5, 1), BatchNormAct2d(5)
        model = convert(adversarial_(nn.Sequential(*layers))).eval().double()
        assert not any(type(m) is BatchNormAct2d for m in model.modules())
        fast = fastres.optimize(model, example_input=images)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images))
        assert len(fast.plan().steps) == 2

    @pytest.mark.parametrize("change", ["hook", "forward"])
    def test_what_was_changed_in_a_batch_norm_act_is_kept(self, images, change):
        model = adversarial_(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))).double()
        act = model[1].act
        if change == "hook":
            act.register_forward_hook(lambda module, args, out: 2 * out)
        else:
            act.forward = lambda x: x.abs()
        fast = fastres.optimize(model, example_input=images)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images))
        assert [why for _, why in fast.plan().fallbacks] == ["has hooks or a forward of its own"]

    def test_a_networks_children_in_a_sequential(self, images):
        source = twins()[1]
        headless = nn.Sequential(*list(source.children())[:-1]).eval()
        fast = fastres.optimize(headless, example_input=images)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), headless(images))
        assert fast(images).shape == (2, 512, 1, 1)
        assert not fast.plan().fallbacks

    @pytest.mark.parametrize("channels", [1, 4, 12])
    @pytest.mark.parametrize("classes", [0, 1, 7])
    def test_other_channels_and_classes(self, channels, classes):
        sizes = {"channels": (16, 24, 32, 40), "in_chans": channels, "num_classes": classes}
        model = adversarial_(timm.create_model("resnet18", **sizes)).double()
        images = real_images(2, 32, channels).double()
        fast = fastres.optimize(model, example_input=images)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images))
        assert fast(images).shape == (2, classes or 40)

    def test_nonsense_statistics_are_refused_by_name(self, images):
        model = adversarial_(timm.create_model("resnet18"))
        model.layer3[1].bn2.running_var[7] = float("inf")
        with pytest.raises(FoldError, match=r"layer3\.1\.bn2\.running_var\[7\] is inf"):
            fastres.optimize(model)


class TestAttributes:
    def test_timms_description_is_kept(self):
        source = timm.create_model("resnet26d", num_classes=9, output_stride=16).eval()
        fast = fastres.optimize(source, verify=False)
        assert fast.feature_info == source.feature_info
        assert fast.pretrained_cfg == source.pretrained_cfg
        assert (fast.num_classes, fast.num_features) == (9, source.num_features)
        config = timm.data.resolve_model_data_config(fast)
        assert config == timm.data.resolve_model_data_config(source)
        fast.feature_info[0]["num_chs"] = 0
        assert source.feature_info[0]["num_chs"] != 0
        with pytest.raises(AttributeError, match="nothing_like_it"):
            fast.nothing_like_it  # noqa: B018

    def test_weights_are_no_attributes(self):
        fast = fastres.optimize(torchvision.models.resnet18().eval(), verify=False)
        with pytest.raises(AttributeError):
            fast.conv1  # noqa: B018


class TestCheckpoints:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_wrapped_checkpoints(self, prefix, tmp_path, images):
        ours, theirs = twins()
        state = {prefix + name: value for name, value in theirs.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pth")
        fresh = fastres.ResNet(fastres.BasicBlock, SHALLOW).double().eval()
        fastres.load_checkpoint(fresh, tmp_path / "wrapped.pth")
        same_eps_(fresh, theirs)
        with torch.no_grad():
            torch.testing.assert_close(fresh(images), theirs(images))

    def test_timms_keys_are_torchvisions(self, tmp_path, images):
        theirs = adversarial_(timm.create_model("resnet50", layers=SHALLOW)).double()
        fastres.save_checkpoint(theirs, tmp_path / "timm.safetensors")
        ours = fastres.ResNet(fastres.Bottleneck, SHALLOW).double().eval()
        fastres.load_checkpoint(ours, tmp_path / "timm.safetensors")
        same_eps_(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images))

    def test_what_does_not_fit_is_listed(self, tmp_path):
        state = torchvision.models.resnet18().state_dict()
        state["extra"] = torch.zeros(1)
        del state["bn1.weight"]
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
        torch.save(state, tmp_path / "odd.pth")
        with pytest.raises(CheckpointError) as caught:
            fastres.load_checkpoint(fastres.resnet18(), tmp_path / "odd.pth")
        for problem in ("missing: bn1.weight", "unexpected: extra", "shape: conv1.weight"):
            assert problem in str(caught.value)


def grad_cam(model, images, label):
    """Selvaraju et al.'s heat map from hooks on the last stage, as its libraries take it."""
    kept = {}

    def keep(_, __, output):
        kept["maps"] = output
        hook = output.register_hook(lambda gradient: kept.update(gradient=gradient))
        kept["hook"] = hook  # the tensor and its hook's dictionary would hold each other forever

    handle = model.layer4.register_forward_hook(keep)
    model.zero_grad()
    logits = model(images)
    logits[:, label].sum().backward()
    handle.remove()
    kept.pop("hook").remove()
    weights = kept["gradient"].mean((2, 3), keepdim=True)
    return (weights * kept["maps"]).sum(1).relu().detach(), logits.detach()


class TestTools:
    @pytest.mark.filterwarnings("ignore:fastres. in eval mode")
    def test_grad_cam(self, images):
        ours, theirs = twins()
        with torch.no_grad(), executions() as ran:
            ours(images)  # the engine has run before the hook comes
        assert ran
        found, logits = grad_cam(ours, images, 3)
        wanted, _ = grad_cam(theirs, images, 3)
        assert float(wanted.max()) > 0
        torch.testing.assert_close(found, wanted)
        with torch.no_grad(), executions() as ran:
            torch.testing.assert_close(ours(images), logits)
        assert ran

    def test_hooks_see_every_layer(self, images):
        ours, theirs = twins()
        shapes = {}
        for model, key in ((ours, "ours"), (theirs, "theirs")):
            seen = shapes[key] = []
            for module in model.modules():
                if not list(module.children()):
                    module.register_forward_hook(lambda m, _, y, seen=seen: seen.append(y.shape))
            with torch.no_grad():
                model(images)
        assert shapes["ours"] == shapes["theirs"]

    def test_the_summary_is_that_of_torchvisions(self):
        both = fastres.resnet50(), torchvision.models.resnet50()
        found, wanted = (fastres.summary(m, (1, 3, 64, 64)) for m in both)
        assert found.table == wanted.table
        assert found.to_dict() == wanted.to_dict()

    def test_flop_counter(self, images):
        ours, theirs = twins()
        counts = []
        for model in (ours, theirs):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(images)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_ensembles_by_vmap(self, images):
        ours, theirs = zip(*(twins() for _ in range(2)), strict=True)
        for pair in (ours, theirs):
            with torch.no_grad():
                pair[1].fc.weight.mul_(-1)
        found, wanted = (ensemble(models, images) for models in (ours, theirs))
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            torch.testing.assert_close(found, torch.stack([model(images) for model in ours]))

    def test_functional_call(self, images):
        ours, theirs = twins()
        state = {name: value * 0.9 for name, value in theirs.state_dict().items()}
        with torch.no_grad():
            torch.testing.assert_close(
                functional_call(ours, state, (images,)), functional_call(theirs, state, (images,))
            )
            torch.testing.assert_close(ours(images), theirs(images))


def ensemble(models, images):
    """All members at once, as PyTorch's tutorial on model ensembling does it."""
    parameters, buffers = stack_module_state(list(models))
    base = copy.deepcopy(models[0]).to("meta")

    def one(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    with torch.no_grad():
        return vmap(one, (0, 0, None))(parameters, buffers, images)
