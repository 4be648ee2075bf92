"""Compare the fused LoRA layer with PEFT's own and with fp64 calculus; test variants and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer import tiny
from tests.trainer.model.test_losses import examples
from trainer import config as settings
from trainer.data.collator import collate
from trainer.model import model
from trainer.model.forward import compile, lora_forward, lora_kernel, losses
from trainer.training import flops, optim
from trainer.training import train as train_module
from trainer.training.distributed import World
from trainer.training.forward import pack_loss
from trainer.training.reporter import Callbacks
from trainer.training.step import Stepper
from trainer.training.student import TrainableStudent
from trainer.training.train import train


def made(folder, **sections):
    return settings.load(tiny.train_toml(folder, tiny.skill(4), **sections))


def student_of(folder, **lora):
    student = model.load_new_student(made(folder, lora=lora), torch.device("cpu"))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():  # B starts at zero; an adapter that does nothing would prove nothing
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=draw)
    return student


def learned(student, pack, row_loss=losses.loss_and_gradient) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = pack_loss(student, collate(pack), row_loss, head=losses.PLAIN_HEAD)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return loss.item(), grads


def parts(dtype=torch.float64, *, bias=True):
    draw = torch.Generator().manual_seed(3)

    def of(*shape, grad=False):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return of(2, 5, 6, grad=True), of(7, 6), of(7) if bias else None, of(3, 6, grad=True), of(7, 3, grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_calculus(bias):
    x, weight, b, down, up = parts(bias=bias)
    assert torch.autograd.gradcheck(
        lambda x, down, up: lora_kernel.lora_linear(x, weight, b, down, up, 1.7), (x, down, up)
    )
    assert weight.grad is None


def test_the_heads_gradient_is_that_of_calculus(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", 3)
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(8, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(11, (8,), generator=draw)
    loss, _ = losses.head_loss(hidden, weight, None, targets)
    loss.backward()
    own = hidden.grad.clone()
    exact = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), hidden
    )[0]
    assert torch.allclose(own, exact, atol=1e-6)


def test_over_a_bf16_base_the_fp32_master_learns_as_in_fp32():
    exact = parts()
    want = lora_kernel.lora_linear(*exact, 0.5)
    want.pow(2).sum().backward()
    x, weight, b, down, up = (t.detach().to(torch.bfloat16) for t in exact)
    x, down, up = x.requires_grad_(), exact[3].detach().float(), exact[4].detach().float()
    down.requires_grad_(), up.requires_grad_()
    got = lora_kernel.lora_linear(x, weight, b, down, up, 0.5)
    assert got.dtype == x.dtype == torch.bfloat16
    got.float().pow(2).sum().backward()
    assert down.grad.dtype == up.grad.dtype == torch.float32
    for mine, theirs in (
        (got, want),
        (x.grad, exact[0].grad),
        (down.grad, exact[3].grad),
        (up.grad, exact[4].grad),
    ):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2e-2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_folded_or_fused_the_loss_and_gradients_are_pefts(tmp_path, rslora, sharded):
    student, pack = student_of(tmp_path, rslora=rslora), examples()
    loss, grads = learned(student, pack)
    assert lora_forward.replace_lora_forward(student, sharded=sharded) == 14
    cheaper, same = learned(student, pack)
    assert cheaper == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == same.keys()
    assert all(torch.allclose(grads[n], same[n], atol=1e-4, rtol=1e-4) for n in grads)


def test_dora_and_dropout_keep_pefts_own_forward(tmp_path):
    for number, lora in enumerate(({"dora": True}, {"dropout": 0.1})):
        assert lora_forward.replace_lora_forward(student_of(tmp_path / str(number), **lora)) == 0


@pytest.mark.parametrize(
    "lora",
    [
        {"dora": True},
        pytest.param({"rslora": True}, marks=pytest.mark.slow),
        pytest.param({"plus_ratio": 16.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_variant_learns_and_peft_loads_it(tmp_path, lora):
    from peft import PeftConfig

    path = tiny.train_toml(
        tmp_path, tiny.skill(24), lora=lora, train={"epochs": 6, "log_every": 1, "lr": 3e-3}
    )
    config, logs = settings.load(path), []
    train(config, Callbacks(on_step=logs.append))
    assert logs[-1].loss < logs[0].loss - 0.2
    values = PeftConfig.from_pretrained(str(config.out_path / "adapter"))
    assert (values.use_dora, values.use_rslora) == (lora.get("dora", False), lora.get("rslora", False))
    model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))


def test_lora_plus_gives_b_its_own_rate(tmp_path):
    config = made(tmp_path, lora={"plus_ratio": 4.0})
    named = model.trainable_parameters(model.load_new_student(config, torch.device("cpu")))
    groups = optim.adamw(named.items(), config.train, config.lora).param_groups
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, p in named.items():
        assert rates[id(p)] == pytest.approx(config.train.lr * (4 if "lora_B" in name else 1))


def test_the_fused_path_takes_the_flop_that_the_formula_names(tmp_path):
    student, [pack] = student_of(tmp_path), [examples(1)]
    student.base_model.model.set_attn_implementation("eager")
    lora_forward.replace_lora_forward(student, sharded=True)
    with FlopCounterMode(display=False) as seen:
        pack_loss(student, collate(pack), head=losses.PLAIN_HEAD)[0].backward()
    assert flops.flop_counter(student, causal=False)(pack) == seen.get_total_flops()


class Reads(TorchDispatchMode):
    """Operations for which a host would have to wait for its device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_its_device(tmp_path):
    config, pack = made(tmp_path), examples()
    student = student_of(tmp_path / "s")
    lora_forward.replace_lora_forward(student)
    named = model.trainable_parameters(student)
    optimiser = optim.adamw(named.items(), config.train, config.lora)
    stepper = Stepper(TrainableStudent(student, named), optimiser, config.train, World())
    with Reads() as reads:
        first = stepper.learn(0, [pack[:3], pack[3:]])
        stepper.learn(1, [pack])
        assert reads.seen == []
        float(first.loss)
    assert reads.seen == ["_local_scalar_dense"]  # and the spy would have seen one


@pytest.mark.slow
def test_between_log_lines_a_training_reads_nothing_back(tmp_path, monkeypatch):
    path = tiny.train_toml(
        tmp_path, tiny.skill(60), train={"epochs": 4, "log_every": 5, "pack_tokens": 128, "save_every": 0}
    )
    seen: dict[int, int] = {}
    original = train_module.TrainingRun.step

    def watched(run, step):
        with Reads() as reads:
            original(run, step)
        seen[step + 1] = len(reads.seen)

    monkeypatch.setattr(train_module.TrainingRun, "step", watched)
    monkeypatch.setattr(
        train_module.TrainingRun, "reads_every_step", False
    )  # as on a device that is not the host
    steps = train(settings.load(path)).steps
    assert steps >= 10
    read = {step for step, count in seen.items() if count}
    assert read == {1, *range(5, steps + 1, 5), steps}  # the first step: does the adapter move at all?


@pytest.mark.long  # a compiler runs
@pytest.mark.filterwarnings("default")  # torch's own
def test_a_compiled_student_loses_the_same(tmp_path):
    student, pack = student_of(tmp_path), examples()
    lora_forward.replace_lora_forward(student)
    loss, grads = learned(student, pack)
    row_loss = compile.compile_student(student)
    assert row_loss is not losses.loss_and_gradient
    for again in (pack, examples(4, seed=8), pack):  # other shapes in between
        compiled, same = learned(student, again, row_loss)
    assert compiled == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(grads[n], same[n], atol=1e-4, rtol=1e-4) for n in grads)
