"""Whether anyone sees a module's calls, so that no other op may stand for them."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def watched(module: nn.Module) -> bool:
    """Whether hooks are set on the module, or a forward of its own."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is the forward of `kind` and no more."""
    return (
        type(module).forward is kind.forward
        and type(module).__call__ is nn.Module.__call__
        and not watched(module)
        and module._compiled_call_impl is None
        and not _has_any_global_hook()
    )
