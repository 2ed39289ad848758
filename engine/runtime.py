"""
The machine that a script runs on: device, precision, compilation and the ranks of torchrun.

A setting that is None in the configuration is chosen here: the device (cuda, else mps, else cpu),
the dtype (bfloat16 on a GPU that has it, float16 on an older one, float32 elsewhere) and whether to
compile (on cuda only).
"""

import ctypes
import gc
import os
import platform
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from engine import sharding

TIMEOUT = timedelta(minutes=10)  # for operations among ranks: a rank that hangs ends the run


@dataclass(frozen=True)
class Runtime:
    device: str  # e.g. 'cuda:0'
    dtype: str  # of the forward pass: 'float32', 'bfloat16' or 'float16'
    compile: bool
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this node
    restarts: int = 0  # how often torchrun has started these processes again
    launch: str = ""  # one torchrun and its restarts, known by --rdzv-id or by its process
    shard: bool = False  # whether each rank holds a part of a model, rather than all of it

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    @property
    def tf32(self) -> bool:
        """Whether matrices in float32 are multiplied in TF32, with 10 bits after the binary point:
        on a GPU, where half precision does for the rest. Who asks for float32 gets float32."""
        return self.device_type == "cuda" and self.dtype != "float32"

    @property
    def precision(self) -> str:
        """The dtype as the first lines of a run tell it."""
        return f"{self.dtype} (float32 products: TF32)" if self.tf32 else self.dtype

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """The context of a forward pass; a no-op in float32."""
        low, dtype = self.dtype != "float32", getattr(torch, self.dtype)
        # The cache would keep the converted weights of every block, though each is used once
        return torch.autocast(self.device_type, dtype, enabled=low, cache_enabled=not self.shard)

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Move batches; on CUDA from pinned memory, without waiting for the GPU."""
        if self.device_type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def place(self, model: torch.nn.Module) -> None:
        """Move a GPT to the device, with the weights of the main process; sharded if wanted."""
        if self.shard:
            sharding.shard(model, self)
        else:
            model.to(self.device)
            self.broadcast(list(model.state_dict().values()))

    def compiled(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, compiled if that was asked for."""
        if not self.compile:
            return model
        if self.device_type == "cpu":  # or an embedding's gradient is summed in any order
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        if not self.shard:
            return torch.compile(model)
        for block in model.transformer.h:  # the gathering of weights, around it, is not compiled
            block.compile()
        return model

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model to train: under DDP, if there are several ranks and it is not sharded."""
        if self.world_size > 1 and not self.shard:
            devices = [torch.device(self.device).index] if self.device_type == "cuda" else None
            # DDP sends rank 0's buffers before a step, when all have the same: see layers.track
            model = DistributedDataParallel(model, device_ids=devices)
        return model

    def share(self, n: int) -> range:
        """This rank's part of n micro-steps, a contiguous range."""
        return range(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def total(self, values: torch.Tensor | list[float]) -> torch.Tensor:
        """Numbers (a vector), each summed over all ranks, in float64; they stay on a GPU."""
        totals = torch.as_tensor(values).detach()
        totals = (totals if totals.is_cuda else totals.cpu()).double()
        if self.world_size > 1:
            totals = totals.to(self.device, non_blocking=True)  # else it would wait for the GPU
            dist.all_reduce(totals)
        return totals

    def sum(self, values: torch.Tensor | list[float]) -> list[float]:
        """The same, on the host. Waits for the device."""
        return self.total(values).tolist()

    def read(self, vector: torch.Tensor) -> Callable[[], list[float]]:
        """A function that returns the vector's numbers of now. It waits for the device as far as it
        has been given work until now; what it is given later can go on meanwhile."""
        if not vector.is_cuda:
            return vector.tolist
        copy, done = vector.to("cpu", non_blocking=True), torch.cuda.Event()
        done.record()
        return lambda: done.synchronize() or copy.tolist()

    def from_main(
        self, make: Callable[[], object], to_others: Callable = lambda result: result
    ) -> object:
        """What `make` returns on the main process; the other ranks get what `to_others` makes of
        it. A UserError is raised on all of them."""
        if self.world_size == 1:
            return make()
        result, shared = None, [None, None]
        if self.is_main:
            try:
                result = make()
                shared[0] = to_others(result)
            except UserError as error:
                shared[1] = str(error)
        dist.broadcast_object_list(shared)
        if shared[1] is not None:
            raise UserError(shared[1])
        return result if self.is_main else shared[0]

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite tensors, of equal shapes on all ranks, with those of the main process."""
        for t in tensors if self.world_size > 1 else ():
            dist.broadcast(t, src=0)

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, on every rank, which waits for the slowest."""
        texts = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, text)
        return texts

    def print(self, line: str) -> None:
        """Print once, from the main process."""
        if self.is_main:
            say(line)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, e.g. before a clock is read."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        elif self.device_type == "mps":
            torch.mps.synchronize()

    def device_name(self) -> str:
        """What the device calls itself; for a CPU also the number of threads that torch uses."""
        if self.device_type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = f", {torch.get_num_threads()} threads" if self.device_type == "cpu" else ""
        return f"{self.device} ({platform.machine()}{threads})"

    def peak_memory(self) -> float | None:
        """Peak memory of this process in MiB, of the GPU if it uses one; None if not known. The
        peak of getrusage would not do: it includes that of the process that started this one."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        with suppress(OSError):  # only Linux has /proc
            return resident("VmHWM")
        return None

    def close(self) -> None:
        """Leave the process group. DDP uses the group and is part of reference cycles: unless it is
        collected first, it ends after the group, and aborts or hangs the process."""
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()


def resident(field: str) -> float:
    """A number of MiB in /proc/self/status, where Linux describes this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def lost_rank(error: RuntimeError) -> bool:
    """Whether an operation among ranks failed because one of them has ended, or does not answer."""
    signs = ("onnection closed", "onnection reset", "roken pipe", "imed out", "imeout")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply matrices in float32 without TF32, for results that are to be exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def say(line: str) -> None:
    """Print to stdout. A disk that is full, or a pipe that is closed, must not end a run."""
    with suppress(OSError):
        print(line, flush=True)


class Interrupt:
    """SIGTERM and SIGINT as a flag, while the context is open; a second signal ends the process. A
    signal within PATIENCE seconds of the first counts as the same one: schedulers signal a whole
    group of processes, and torchrun its ranks."""

    PATIENCE = 2.0

    def __init__(self):
        self.signal, self.time = 0, 0.0  # number and time of the first signal
        self.noted = lambda: [0.0, 0.0]  # what the ranks said at the last poll that did not wait

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def poll(self, rt: Runtime, wait: bool = True) -> int:
        """The exit code that a signal to any rank asks for: 143 (SIGTERM), 130 (SIGINT); or 0.
        Several GPUs need not be waited for: without `wait` they say what they had noted at the call
        before."""
        flags = [float(self.signal == number) for number in (signal.SIGTERM, signal.SIGINT)]
        noted = rt.read(rt.total(flags))
        if not wait and rt.world_size > 1 and rt.device_type == "cuda":
            noted, self.noted = self.noted, noted
        terminate, interrupt = noted()
        return 143 if terminate else 130 if interrupt else 0

    def _note(self, number, frame):
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
        elif time.monotonic() > self.time + self.PATIENCE:
            os._exit(128 + number)


@contextmanager
def session(
    device: str | None,
    dtype: str | None,
    compile: bool | None,
    backend: str | None,
    shard: bool = False,
) -> Iterator[Runtime]:
    """`start`, and on the way out `close`. Memory that runs out becomes a UserError. A rank that
    misses another one ends with exit code 1, so that torchrun can restart them."""
    rt = start(device, dtype, compile, backend, shard)
    keep_freed_memory(rt.device_type)
    try:
        yield rt
    except (UserError, MemoryError, RuntimeError) as error:
        traceback.clear_frames(error.__traceback__)  # DDP must end before its process group
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if is_memory or "can't allocate memory" in reason:
            repair = "halve --batch_size and double --gradient_accumulation_steps"
            raise UserError(f"out of memory ({reason}); {repair}", this_rank=True) from error
        if rt.world_size == 1 or not lost_rank(error):
            raise
        print(f"rank {rt.rank}: another rank is gone ({reason[:160]})", file=sys.stderr)
        sys.exit(1)
    finally:
        rt.close()


def fresh_store(rank: int, world_size: int) -> dist.Store:
    """A part of torchrun's store that only the present processes know. torchrun keeps its store
    over restarts (torch 2.13), so that ranks would find the addresses of ranks that died. Here rank
    0 makes up a prefix and gives it to each other rank, under a name which that rank made up."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", name)
        ours = dist.PrefixStore(store.get(f"answer/{name}").decode(), store)  # waits for it
        ours.add("joined", 1)
        return ours
    ours = dist.PrefixStore(name, store)
    while ours.add("joined", 0) < world_size - 1:
        for key in (f"asks/{other}" for other in range(1, world_size)):
            if store.check([key]):
                store.set(f"answer/{store.get(key).decode()}", name)
        time.sleep(0.02)
    return ours


def keep_freed_memory(device_type: str) -> None:
    """Have glibc reuse large blocks of memory instead of returning them to the system. A training
    step frees all the memory that it took. To get it again costs a page fault every 4 KiB, a tenth
    of the step's time on a CPU. The price is a peak that is up to a fifth higher."""
    if device_type != "cpu":
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


def limit_threads(parameters: int, tokens: int) -> None:
    """Use one thread where a second one does not pay, but would wait, spinning, for the first one
    whenever another job has its core: for small models. OMP_NUM_THREADS overrides this."""
    if parameters * tokens < 2**24 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def start(
    device: str | None,
    dtype: str | None,
    compile: bool | None,
    backend: str | None = None,
    shard: bool = False,
) -> Runtime:
    """Find the device and join torchrun's process group, if there is one. Raises UserError for a
    device that this machine does not have."""
    number = lambda name, default=0: int(os.environ.get(name, default))
    rank, world_size, local_rank = number("RANK"), number("WORLD_SIZE", 1), number("LOCAL_RANK")
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    if torch.cuda.is_available():
        best = "cuda"
    device = device or best
    if device == "cuda":  # torch wants an index; under torchrun each process takes its own
        device = f"cuda:{local_rank}"
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device to compute on")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = f"device={device} can't be used here; leave it out for {best}"
        raise UserError(problem, this_rank=True) from error
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = dtype or ("bfloat16" if has_bf16 else "float16")
        compile = True if compile is None else compile
    if world_size > 1:
        backend = backend or ("nccl" if device.startswith("cuda") else "gloo")
        options = {"device_id": torch.device(device)} if backend == "nccl" else {}
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = fresh_store(rank, world_size)
                options |= {"store": store, "rank": rank, "world_size": world_size}
            dist.init_process_group(backend=backend, timeout=TIMEOUT, **options)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"rank {rank} can't join the others: {reason}", True) from error
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launch == "none":
        launch = f"child of {os.getppid()}"  # torchrun's own process
    ranks = rank, world_size, local_rank, number("TORCHELASTIC_RESTART_COUNT")
    rt = Runtime(device, dtype or "float32", bool(compile), *ranks, launch, shard)
    torch.set_float32_matmul_precision("high" if rt.tf32 else "highest")
    return rt
