"""Test the CUDA path as far as a CPU can; tests that need another device's properties set them."""

from __future__ import annotations

import os
import types
from itertools import count

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from tests.trainer import tiny
from tests.trainer.architectures import bases
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.model.test_losses import examples
from trainer import config as settings
from trainer.config import CUDA_PACK_TOKENS, PACK_TOKENS
from trainer.data import packing
from trainer.data.collator import collate
from trainer.data.order import Order
from trainer.errors import ConfigError
from trainer.evaluation import evaluate
from trainer.model import model, self_test
from trainer.model.forward import compile, lora_forward, losses, rows, segment_attention, varlen_attention
from trainer.training import checkpoint, distributed, memory, plan, reporter, step, student, train
from trainer.training.distributed import World
from trainer.training.forward import pack_loss
from trainer.training.reporter import Callbacks

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Let torch say that a GPU of a compute capability is there."""

    def set_capability(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # by emulation on old ones
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return set_capability


def made(folder, **train):
    return settings.load(tiny.train_toml(folder, tiny.skill(4), train=train))


def test_an_old_gpu_gets_fp32_and_the_attention_that_runs_there(gpu):
    gpu(7, 5)
    assert model.base_dtype(CUDA) == torch.float32
    assert not varlen_attention.can_run(LlamaConfig(), CUDA)
    assert self_test.packed_attention(CUDA, LlamaConfig()) == "distil_segments"
    gpu(9, 0)
    assert model.base_dtype(CUDA) == torch.bfloat16
    assert self_test.packed_attention(CUDA, LlamaConfig()) == "distil_varlen"


@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_computes_fp32_in_tf32_and_adds_in_a_fixed_order_where_asked(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with model.arithmetic(settings.TrainSection(deterministic=deterministic), CUDA):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_the_cpu_precision_and_kernels_stay_as_they_are():
    with model.arithmetic(settings.TrainSection(deterministic=True), torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_that_cannot_be_deterministic_ends_with_the_setting_to_change(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(step, "pack_losses", refuse)
    with pytest.raises(ConfigError, match="cumsum_cuda_kernel") as caught:
        train.train(made(tmp_path, deterministic=True))
    assert caught.value.place == "train.deterministic"
    assert "[train] deterministic = false" in caught.value.remedy


@pytest.mark.parametrize(
    ("shape", "runs"),
    [
        ({"head_dim": 128}, True),
        ({"head_dim": 256}, True),
        ({"head_dim": 320}, False),
        ({"head_dim": 100}, False),
        ({"attention_dropout": 0.1}, False),
    ],
)
def test_the_kernel_runs_within_its_limits_only(gpu, shape, runs):
    gpu(8, 0)
    assert varlen_attention.can_run(LlamaConfig(**shape), CUDA) is runs


def test_rows_are_laid_out_for_the_attention_that_was_chosen(gpu):
    lengths = [5, 3]
    assert isinstance(rows.segments_of(lengths, "cpu"), rows.SegmentGroups)
    assert isinstance(rows.segments_of(lengths, "cpu", "distil_varlen"), rows.DocumentBounds)
    assert isinstance(rows.segments_of(lengths, "cpu", "distil_segments"), rows.SegmentGroups)


@pytest.mark.parametrize(
    ("processes", "wanted"), [(1, CUDA_PACK_TOKENS), (4, CUDA_PACK_TOKENS // 4), (64, PACK_TOKENS)]
)
def test_packs_are_large_on_cuda_and_each_process_has_one(tmp_path, gpu, processes, wanted):
    config = settings.parse(
        {"student": {"base": "b"}, "data": {"corpus": "c"}}, root=tmp_path, place="train.toml"
    )
    assert (
        model.fit_to_device(
            config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
        ).train.pack_budget
        == PACK_TOKENS
    )
    gpu(9, 0)
    assert model.fit_to_device(config, processes).train.pack_budget == wanted
    fixed = config.model_copy(update={"train": config.train.model_copy(update={"pack_tokens": 4096})})
    assert model.fit_to_device(fixed, processes).train.pack_budget == 4096


@pytest.mark.slow  # torch traces a student of two layers for about 15 s
# torch asks tensors inside a graph for their gradient, and hides the warning that it causes by itself. It
# can't hide a warning that pytest turns into an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.long), True])
def test_compiled_layers_are_really_compiled_and_only_once(tmp_path, checkpointing):
    """Counts graphs: checkpointed layers had none, and each new number of groups made new ones."""
    made_student = model.load_new_student(made(tmp_path), torch.device("cpu"))
    parameters = list(model.trainable_parameters(made_student).values())
    packs = [collate(examples(n)) for n in (5, 9, 20, 60)]
    assert len({len(pack.segments) for pack in packs}) > 1
    if checkpointing:
        memory.enable_checkpointing(made_student)
    lora_forward.replace_lora_forward(made_student)

    def learned(pack):
        loss, _ = pack_loss(made_student, pack)
        return loss.detach(), torch.autograd.grad(loss, parameters)

    with torch.compiler.set_stance("force_eager"):
        eager = [learned(pack) for pack in packs]
    from torch._dynamo.testing import CompileCounterWithBackend  # loads half of the compiler

    counter = CompileCounterWithBackend("eager")
    compile.compile_student(made_student, checkpointing=checkpointing, backend=counter)
    graphs = []
    try:
        for pack, (wanted_loss, wanted) in zip(packs, eager, strict=True):
            loss, gradients = learned(pack)
            graphs.append(counter.frame_count)
            assert torch.allclose(loss, wanted_loss, rtol=1e-6)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, wanted, strict=True))
    finally:
        torch._dynamo.reset()
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * len(packs)


@pytest.mark.parametrize("verb", ["plan", "doctor", "train"])
def test_a_student_whose_rows_are_not_packed_is_not_compiled(tmp_path, run_trainer, verb):  # noqa: F811
    path = bases.train_toml(tmp_path, "lfm2", train={"compile": True})
    code, _, err = run_trainer(verb, path)
    assert code in (1, 2)  # doctor: a fatal fault
    assert "can't be compiled" in err
    assert "compile = false" in err


def test_a_compiler_that_fails_ends_in_one_message(tmp_path, run_trainer, monkeypatch):  # noqa: F811
    def backend(*_):
        raise RuntimeError("C++ compile error")

    broken = torch.compile(lambda x: x + 1, backend=backend)
    monkeypatch.setattr(step, "pack_losses", lambda *_: [(broken(torch.zeros(2)).sum(), 0)])
    path = tiny.train_toml(tmp_path, tiny.skill(4))
    try:
        code, _, err = run_trainer("train", path)
    finally:
        torch._dynamo.reset()
    assert code == 2
    assert "torch.compile can't compile this student" in err
    assert "compile = false" in err


@pytest.mark.slow
def test_recomputation_is_decided_before_the_base_is_loaded(tmp_path, monkeypatch):
    """After loading, the base would be counted twice: in the peak, and as memory that is not free."""
    config = made(tmp_path)
    pack = examples(5)
    peak = memory.estimate(config, pack, checkpointing=False).peak
    size = (config.base / "model.safetensors").stat().st_size
    loaded = []
    original = model.load_new_student
    monkeypatch.setattr(
        model, "load_new_student", lambda *args, **more: loaded.append(1) or original(*args, **more)
    )
    free = round(peak / memory.USABLE_SHARE) + 1024
    monkeypatch.setattr(memory, "available_bytes", lambda *_: free - size * len(loaded))
    planned = memory.needs_checkpointing(config, pack)
    assert student.load_student(config, pack, World()).checkpointing is planned is False


def test_the_peak_of_a_fleet_is_that_of_all_its_devices(monkeypatch):
    monkeypatch.setattr(model, "peak_flops", lambda _device: 100.0)
    assert reporter.fleet_peak_flops(CUDA, World(0, 4)) == 400.0
    monkeypatch.setattr(model, "peak_flops", lambda _device: None)
    assert reporter.fleet_peak_flops(CUDA, World(0, 4)) is None


@pytest.mark.parametrize(("lora", "slow"), [({}, 0), ({"dropout": 0.1}, 14), ({"dora": True}, 14)])
def test_layers_that_keep_a_slower_forward_are_counted(tmp_path, lora, slow):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4), lora=lora))
    made_student = model.load_new_student(config, torch.device("cpu"))
    assert lora_forward.slow_layers(made_student) == (slow, 14)


def test_the_gradient_of_a_bf16_head_is_scaled_in_fp32():
    torch.manual_seed(0)
    hidden = torch.randn(7, 64).bfloat16().requires_grad_()
    weight = torch.randn(50, 64).bfloat16()
    targets = torch.arange(7)
    tokens = 12_311  # 1 / 12,311 in bf16 is off by 0.2 %
    (losses.head_loss(hidden, weight, None, targets)[0] / tokens).backward()
    scaled = hidden.grad.float()
    hidden.grad = None
    losses.head_loss(hidden, weight, None, targets)[0].backward()
    exact = hidden.grad.float() / tokens
    assert float(scaled.norm() / exact.norm()) == pytest.approx(1, abs=2e-4)


def test_bounds_go_to_the_device_from_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_args, **_more: calls.append("copy") or self)
    varlen_attention.document_bounds([4, 3], CUDA)
    assert calls == ["pin", "copy"]


def test_moments_are_copied_to_the_host_and_gradients_summed_in_pieces(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimiser.step()
    moments = checkpoint.optimiser_moments(optimiser, {"w": parameter})
    assert all(tensor.device.type == "cpu" for tensor in moments.values())
    assert moments["w/exp_avg"].data_ptr() != optimiser.state[parameter]["exp_avg"].data_ptr()
    sizes = []
    monkeypatch.setattr(distributed, "MAX_ELEMENTS", 10)
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda flat: sizes.append(flat.numel()))
    World(0, 2).sum_in_place([torch.zeros(n) for n in (4, 5, 30, 1, 2)])
    assert sizes == [9, 30, 3]


def test_the_allocator_may_grow_its_blocks(monkeypatch):
    from trainer.cli import main as cli

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    seen = []
    monkeypatch.setattr(cli, "app", lambda **_: seen.append(cli.os.environ["PYTORCH_CUDA_ALLOC_CONF"]))
    monkeypatch.setattr(cli, "end_on_sigterm", lambda: None)
    cli.main()
    assert seen == ["expandable_segments:True"]


@pytest.mark.parametrize("channels", [64, 32 * 128, 64 * 128, 128 * 128])
@pytest.mark.parametrize("budget", [2048, 16_384, 100_000])
def test_no_pack_passes_the_indices_of_the_kernel(budget, channels):
    most = packing.max_documents(budget, channels)
    assert 1 <= most <= packing.MAX_DOCUMENTS
    padded = (budget + packing.PADDING_OF_DOCUMENT * most) * channels
    assert padded < 2**31 or most == 1


def test_a_wide_student_has_fewer_documents_in_a_pack():
    shape = settings.TrainSection(epochs=1, batch_tokens=16_384, pack_tokens=16_384, max_length=64)
    lengths = [4] * 6000

    def most(order: Order) -> int:
        return max(len(pack) for step in range(order.steps) for pack in order.packs(step))

    assert most(Order(lengths, shape, 64)) == 4096
    assert most(Order(lengths, shape, 64 * 128)) == packing.max_documents(16_384, 64 * 128) < 2000


def test_ranks_wait_for_a_long_task_of_the_first_one_without_nccl(monkeypatch):
    """A base is hashed and an adapter written while the others wait; NCCL would give up after ten minutes."""
    groups = []
    fake = types.SimpleNamespace(
        rendezvous=lambda _url, timeout: iter([("all", 0, 2)]),
        PrefixStore=lambda prefix, store: f"{prefix}/{store}",
        init_process_group=lambda backend, **more: groups.append((backend, more)),
        new_group=lambda **more: groups.append(("group", more)) or "host",
        get_rank=lambda: 0,
        destroy_process_group=lambda: None,
        ReduceOp=types.SimpleNamespace(MAX="max"),
        all_reduce=lambda tensor, op, group: groups.append((op, group)),
    )
    monkeypatch.setattr(distributed, "distributed", fake)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _number: None)
    with distributed.join_world() as world:
        world.barrier()
    assert groups[0] == ("nccl", {"store": "trainer/all", "rank": 0, "world_size": 2})
    assert groups[1] == ("group", {"backend": "gloo", "timeout": distributed.HOST_TIMEOUT})
    assert groups[2] == ("max", "host")
    assert distributed.HOST_TIMEOUT.total_seconds() >= 3600


def test_lines_of_the_log_come_by_time_too(tmp_path, monkeypatch):
    rows_ = tiny.skill(40)
    shape = {"log_every": 1000, "log_every_s": 10.0, "epochs": 2, "max_steps": 8, "pack_tokens": 128}
    config = settings.load(tiny.train_toml(tmp_path, rows_, train=shape))
    clock = count(0.0, 1.5)
    monkeypatch.setattr("trainer.training.logbook.time.monotonic", lambda: next(clock))
    logs: list[int] = []
    done = train.train(config, Callbacks(on_step=lambda log: logs.append(log.step)))
    assert done.steps == 8
    assert logs[-1] == 8
    assert len(logs) > 1


class Operations(TorchDispatchMode):
    """Count operations, each of which is about one kernel launch on a device; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_answers_on_cuda_take_fewer_operations_than_pefts_forward(tmp_path):
    made_student = model.load_new_student(made(tmp_path), torch.device("cpu")).eval()
    made_student.base_model.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for name, parameter in made_student.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.1)
            else:
                parameter.data = parameter.bfloat16()  # as on CUDA

    def step():
        with torch.inference_mode(), Operations() as seen:
            return made_student(input_ids=torch.arange(3, 20)[None]).logits.float(), seen.count

    logits, operations = step()
    evaluate.make_cheaper(made_student, made(tmp_path / "b"), CUDA)
    again, fewer = step()
    assert fewer <= operations - 2 * 14  # layers with an adapter
    assert float((again - logits).norm() / logits.norm()) < 2e-2


@pytest.mark.parametrize(("pack_tokens", "times"), [(128, 4), (256, 0), (512, 0)])
def test_the_plan_says_how_often_a_split_base_is_gathered(tmp_path, pack_tokens, times):
    """Two processes with steps of 512 tokens: two packs of 128 each, or one of 256, or one pack for both."""
    config = made(tmp_path, batch_tokens=512, pack_tokens=pack_tokens, shard="always")
    notes = [note for note in plan.plan(config, processes=2).notes if "gathers" in note]
    assert len(notes) == bool(times)
    assert not times or f"gathers all of it {times} times a step" in notes[0]
    assert not [note for note in plan.plan(config).notes if "gathers" in note]


def windowed(q, k, v, starts, _starts, _longest, _also, *, scale=None, window_size=(-1, -1)):
    """What torch 2.11's kernel computes with a window, written with a mask."""
    assert window_size[1] == 0
    outs = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None]
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        out = functional.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 1, 4, 64])
def test_windows_are_those_of_the_cpu_path_within_each_document(monkeypatch, window):
    """Windows shorter and longer than documents; four query heads for each of two key heads."""
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: windowed)
    lengths = [9, 5, 5, 1]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, generator=draw) for heads in (8, 2, 2))
    of_cuda = varlen_attention.document_bounds(lengths, "cpu")
    options = {"scaling": 0.3, "sliding_window": window}
    found, _ = varlen_attention.attend(None, q, k, v, None, segments=of_cuda, **options)
    of_cpu = rows.segments_of(lengths, "cpu")
    module = types.SimpleNamespace(num_key_value_groups=4)
    wanted, _ = segment_attention.attend(module, q, k, v, None, segments=of_cpu, **options)
    assert torch.allclose(found, wanted, atol=1e-5)
