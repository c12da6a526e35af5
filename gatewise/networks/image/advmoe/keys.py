"""Mapping from AdvMoE's published weights to the networks here."""

from __future__ import annotations

from gatewise.catalog.keys import KeyLayout, Rule

ROUTER_RULES: tuple[Rule, ...] = (
    ("^router.conv1", "^router.stem.conv"),
    ("^router.bn1", "^router.stem.norm"),
    ("^router.layer{i+1}.{j}.conv{k+1}", "^router.stages.{i}.{j}.units.{k}.conv"),
    ("^router.layer{i+1}.{j}.bn{k+1}", "^router.stages.{i}.{j}.units.{k}.norm"),
)


def official_layout(rules: tuple[Rule, ...]) -> KeyLayout:
    """Return the layout of the published files, which repeat the router under every routed convolution (read once)."""
    return KeyLayout("official", (*ROUTER_RULES, *rules), dropped=r".+\.router\..*")
