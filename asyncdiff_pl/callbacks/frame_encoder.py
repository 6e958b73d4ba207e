"""The process that encodes frames: the one that computes starts it, hands it raw pixels, and waits.

Pillow's PNG and GIF encoders hold Python's global lock while they compress. In a thread of the process that computes
they keep it from launching kernels for as long: hundreds of milliseconds for a video.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from asyncdiff_pl.callbacks import frame_files
from asyncdiff_pl.callbacks.frame_files import Preview


class FrameEncoder:
    """Writes frames in a process of its own, which starts at once and ends with `close` or with this process.

    One thread at a time may use it.
    """

    def __init__(self) -> None:
        # a terminal sends Ctrl-C to all of its processes, a cluster SIGTERM: what was given is written nevertheless. A
        # signal that is blocked stays so in the new process, from its first moment on
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            # -P: the file's folder, whose names are not meant for all, stays out of what can be imported.
            # multiprocessing would run the main script again, and import torch with it
            command = [sys.executable, "-P", frame_files.__file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._end: RuntimeError | None = None

    def encode(
        self,
        frames: Sequence[Image.Image],
        pictures: Sequence[Path] = (),
        animation: Path | None = None,
        fps: int = 1,
        is_shown: bool = False,
    ) -> Preview | None:
        """Writes the files of one sample, and returns its preview if it is shown; others may compute meanwhile.

        Args:
            frames: One picture, or the frames of a video, of one size.
            pictures: Where each frame is written as a PNG file; none where they are not.
            animation: Where all are written as a GIF or a WebP, as its ending says; None where they are not.
            fps: Frames a second.
            is_shown: Whether a preview is made.

        Raises:
            OSError: A file could not be written.
            RuntimeError: The process ended before it was done.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        settings = {"pictures": pictures, "animation": animation, "fps": fps, "is_shown": is_shown}
        try:
            # whether it is gone is found out below
            with suppress(BrokenPipeError):
                pickle.dump((len(frames), settings), requests)
                # one by one: a pickler keeps all pixels until it is done
                for frame in frames:
                    pickle.dump(frame, requests)
                requests.flush()
            answer = pickle.load(answers)
        except (EOFError, pickle.UnpicklingError):
            # one error, however often it is met
            self._end = self._end or RuntimeError(self._how_it_ended())
            raise self._end from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"The process that writes frames {how} before they were written; is there memory left on this machine?"
