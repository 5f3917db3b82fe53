"""What the machine of a rank is busy with: processor, memory, GPU."""

from contextlib import suppress

import psutil
import torch


class System:
    """Samples of this process, its machine and its GPU; rates are since the last sample."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self.sample()  # psutil's first percentages are 0: they need something to compare with

    def sample(self) -> dict[str, float]:
        """Percentages of the whole, and bytes.

        host_cpu and host_memory are the machine's; rss is the trainer's with its decoding
        processes', shared pages counted in each. gpu_busy needs NVIDIA's nvidia-ml-py.
        """
        values = {
            "host_cpu_percent": psutil.cpu_percent(),
            "host_memory_percent": psutil.virtual_memory().percent,
            "rss_bytes": float(self._resident()),
            "threads": float(self._process.num_threads()),
        }
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            values["gpu_memory_percent"] = 100 * (1 - free / total)
            values["gpu_allocated_peak_bytes"] = float(torch.cuda.max_memory_allocated())
            with suppress(ModuleNotFoundError, RuntimeError):
                values["gpu_busy_percent"] = float(torch.cuda.utilization(self._device))
        return values

    def _resident(self) -> int:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                total += process.memory_info().rss
        return total
