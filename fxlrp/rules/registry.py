"""Rules for ops of the user's own, beside ``torch.library``, which registers the ops themselves."""

from __future__ import annotations

from typing import Any

from ..errors import CompositeError
from .activation import op_name
from .base import Rule
from .table import OP_KINDS

_RULES: dict[str, Rule] = {}


def register_rule(op: Any, rule: Rule) -> None:
    """Give an op of your own its rule, under every composite that has rules.

    Args:
        op: the op, or its name as ``torch.library`` has it: ``"mylib::scan"``.
        rule: what it does. A rule of your own is a frozen dataclass that derives from
            :class:`fxlrp.rules.Rule`; its ``linearize`` returns the op's output and the map from the output's
            coefficient to the operands'.

    Raises:
        CompositeError: the op has a kind already, and rules by kind are a composite's; or this is no rule.

    Example:
        >>> fxlrp.register_rule("mylib::scan", ScanRule())
    """
    if not isinstance(rule, Rule):
        raise CompositeError(f"register_rule takes an op and a rule, such as Taylor(); got {rule!r}.")
    name = op.split(".")[0] if isinstance(op, str) else qualified_name(op)
    if "::" not in name:
        raise CompositeError(f"An op is named as torch.library has it, 'mylib::scan'; got {name!r}.")
    if op_name(name) in OP_KINDS:
        raise CompositeError(
            f"'{name}' is of kind {OP_KINDS[op_name(name)]!r} already. Another rule for it is a composite's: "
            f"fxlrp.Composite([(fxlrp.op('{name}'), {rule!r})])."
        )
    _RULES[name] = rule


def registered_by_name(name: str) -> Rule | None:
    """The rule that the user registered for an op of this qualified name, or None."""
    return _RULES.get(name)


def qualified_name(op: Any) -> str:
    """An op's name as ``torch.library`` has it, without overload: ``aten::mul``."""
    packet = getattr(op, "overloadpacket", op)
    schema = getattr(packet, "_qualified_op_name", None)
    return schema if isinstance(schema, str) else str(getattr(packet, "__name__", packet))
