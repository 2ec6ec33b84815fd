"""What becomes of inherited keys where a file chooses another variant of a union."""

from typing import Any

from elastic_megatron.recipe.annotations import child, is_section, members_of, tags_of
from elastic_megatron.recipe.document import Node


def without_abandoned(node: Node, kind: Any) -> Node:
    """`node`, a part of a document of this type, without keys that the choice of another variant left behind.

    Where sections are told apart by a key (`kind`, `runtime`, `metric`), and that key is written in a higher layer
    than some key that only other variants have, nobody means the latter any more. One in the same layer, or in a
    higher one, is a mistake, and stays.
    """
    members = members_of(kind)
    chosen = members[0] if len(members) == 1 else object
    match node.value:
        case dict() as entries:
            if len(members) > 1 and all(is_section(member) for member in members):
                chosen, entries = _chosen(entries, members)
            return Node(
                {key: without_abandoned(inner, child(chosen, key)[0]) for key, inner in entries.items()},
                node.mark,
            )
        case list() as items:
            return Node(
                [without_abandoned(item, child(chosen, index)[0]) for index, item in enumerate(items)],
                node.mark,
            )
    return node


def _chosen(entries: dict[str, Node], members: list[Any]) -> tuple[Any, dict[str, Node]]:
    """The variant that the entries choose (`object` where none is), and those that are still meant."""
    tag = entries.get(members[0].discriminator)
    chosen = [member for member in members if tag is not None and tag.value in tags_of(member)]
    if tag is None or not chosen:
        return object, entries
    foreign = {key for member in members for key in member.model_fields} - chosen[0].model_fields.keys()
    kept = {
        key: node for key, node in entries.items() if key not in foreign or node.mark.layer >= tag.mark.layer
    }
    return chosen[0], kept
