"""The `vllm.general_plugins` entry point. vLLM runs it in the argument parser, the engine core and every worker.

It puts a hook where vLLM reads a speculative configuration, and one where its Model Runner V2 makes a speculator; what
serves a speculator is loaded when one is named.
"""

from __future__ import annotations

import os
import sys

# Files and modules that register speculators of other packages, as PATH lists folders; `serve --import` sets it.
IMPORTS_VARIABLE = "VERL_SPECULATOR_IMPORT"


def register() -> None:
    """Make vLLM recognise the speculators of this package; safe to call several times.

    A failure must not stop a vLLM that serves something else, so it is told on stderr. A speculator that is named
    nevertheless ends in vLLM's own error about a model it does not know.
    """
    try:
        from verl_speculator.serving import speculative_config_hook
        from verl_speculator.serving.v2 import hook

        speculative_config_hook.install()
        if speculative_config_hook.has_v2():
            hook.install()
        for name in filter(None, os.environ.get(IMPORTS_VARIABLE, "").split(os.pathsep)):
            from verl_speculator.models.importing import import_code

            import_code(name, IMPORTS_VARIABLE)
    except Exception as error:
        print(
            f"verl_speculator: this vLLM cannot serve its speculators; everything else works as usual. The reason: "
            f"{type(error).__name__}: {error}",
            file=sys.stderr,
        )
