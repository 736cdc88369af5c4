"""Bridges to other people's training code, each pinned to the one release that it was tested with; they may change."""
