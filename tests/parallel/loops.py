"""The loop of a pipeline, told from what is before and after it."""

import contextlib


class _Loop:
    """A pipeline's progress bar, which is there just as long as its loop."""

    def __init__(self, bar, within):
        self.bar, self.within = bar, within
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.stack.enter_context(self.within())
        return self.bar.__enter__()

    def __exit__(self, *error):
        self.stack.close()
        return self.bar.__exit__(*error)

    def __iter__(self):
        for entry in self.bar:
            with self.within():
                yield entry


def in_loop(pipe, within):
    """Lets a pipeline's loop run in a context.

    Args:
        pipe: A diffusers pipeline; its progress bar is wrapped for good.
        within: Makes the context.
    """
    bar = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: _Loop(bar(*args, **kwargs), within)
