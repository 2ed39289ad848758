"""nanoGPT in a process of its own, on which settings of this project's process do not act."""

import importlib.util
import io
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress

from configurator import UserError
from engine import runtime

PAUSE = 0.1  # seconds between the two processes' turns: OpenMP's threads go on spinning for a while


class NanoGPT:
    """A process that measures the function which `make(config, rt, nanoGPT's model.py)` returns;
    `config.nanogpt` is the folder of a clone of nanoGPT."""

    def __init__(self, make: Callable, config):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, remote_end = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(remote_end, make, config), daemon=True)
        self.process.start()
        remote_end.close()

    def measure(self, measurement: Callable) -> float | None:
        """measurement(function, rt), in that process. Raises UserError if the process has ended."""
        time.sleep(PAUSE)
        try:
            self.pipe.send(measurement)
            value = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            problem = f"nanoGPT's process ended with exit code {self.process.exitcode}"
            raise UserError(f"{problem}; see its own messages above") from error
        time.sleep(PAUSE)
        return value

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(pipe, make: Callable, config) -> None:
    """The main of nanoGPT's process: apply each measurement from the pipe, until it is closed."""
    rt = runtime.start(config.device, config.dtype, config.compile, config.backend)
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{config.nanogpt}/model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # where its dataclass looks itself up
    with redirect_stdout(io.StringIO()):  # nanoGPT prints while it builds a model
        spec.loader.exec_module(module)
        run = make(config, rt, module)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            measurement = pipe.recv()
            pipe.send(measurement(run, rt))
