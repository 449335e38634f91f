"""A method for a study of test_ray.py that loses its Ray worker."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


class KillsItsWorker(Callback):
    """Kill the process that has started this one, and go on if nobody ends it; the second time, fail."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.num_training_batches == 1:  # the study tries it out
            return
        note = Path("killed")
        try:
            note.touch(exist_ok=False)
        except FileExistsError:
            raise RuntimeError("the method broke") from None
        note.write_text(str(os.getpid()))
        print(f"killing the worker at the end of epoch {trainer.current_epoch + 1}", flush=True)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
        Path("went-on").touch()
