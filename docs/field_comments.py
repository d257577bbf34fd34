"""An extension of griffe: the comment behind a field of a class is its description."""

import re
from typing import Any

from griffe import Attribute, Docstring, Extension

_COMMENT = re.compile(r"  # (?!noqa|type:|fmt:)(.+)$")


class FieldComments(Extension):
    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        found = _COMMENT.search(attr.lines[-1]) if attr.lines and attr.parent.is_class else None
        if found and attr.docstring is None:
            attr.docstring = Docstring(found[1], parent=attr, lineno=attr.lineno)
