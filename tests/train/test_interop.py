"""fastres' networks in the loops of others: torchvision's losses, bit for bit, on a CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastres

torchvision = pytest.importorskip("torchvision")
GIVEN = torch.Generator().manual_seed(3)
BATCHES = [
    (torch.randn(4, 3, 32, 32, generator=GIVEN), torch.randint(0, 5, (4,), generator=GIVEN))
    for _ in range(3)
]


@pytest.fixture(scope="module")
def networks():
    """torchvision's network and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5)
    ours = fastres.resnet18(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def both(networks, run):
    found = [run(copy.deepcopy(network)) for network in networks]
    assert len(set(found[0])) > 1  # the losses move
    assert found[0] == found[1]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)


def test_torchvisions_reference_loop(networks):
    """As references/classification/train.py: smoothing, an average, an evaluation in between."""

    def run(model):
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer, losses = sgd(model), []
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        for x, y in BATCHES:
            model.train()
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(float(loss.detach()))
            model.eval()
            with torch.inference_mode():
                model(x)
        return losses

    both(networks, run)


def test_timms_scheduler_and_average(networks):
    timm = pytest.importorskip("timm")
    scheduler = pytest.importorskip("timm.scheduler")

    def run(model):
        optimizer, losses = sgd(model), []
        schedule = scheduler.CosineLRScheduler(optimizer, 3, warmup_t=1, warmup_lr_init=1e-3)
        average = timm.utils.ModelEmaV3(model, decay=0.9)
        for step, (x, y) in enumerate(BATCHES):
            loss = F.cross_entropy(model.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step(step + 1)
            average.update(model)
            losses.append(float(loss.detach()))
        averaged = average.module.state_dict()["layer1.0.conv1.weight"]
        return [*losses, float(averaged.abs().sum())]

    both(networks, run)


def test_accelerate(networks):
    accelerate = pytest.importorskip("accelerate")

    def run(model):
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, sgd(model))
        losses = []
        for x, y in BATCHES:
            loss = F.cross_entropy(model.train()(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    both(networks, run)


def test_lightning(networks, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return sgd(self.model)

    def run(model):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", default_root_dir=tmp_path,
            enable_model_summary=False, **quiet,
        )  # fmt: skip
        module = Module(model)
        trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
        return module.losses

    both(networks, run)
