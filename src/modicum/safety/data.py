"""Rows of safety reasoning and of the arms beside it; see :mod:`modicum.jobs.safety_data`."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.jobs.safety_data import (
        build_contrast_rows,
        build_filler_rows,
        build_preference_rows,
        build_prompt_rows,
        build_rt_rows,
        build_srg_rows,
        decontaminate,
        load_guidelines,
        render_teacher_prompt,
    )

__all__ = [
    "build_contrast_rows",
    "build_filler_rows",
    "build_preference_rows",
    "build_prompt_rows",
    "build_rt_rows",
    "build_srg_rows",
    "decontaminate",
    "load_guidelines",
    "render_teacher_prompt",
]

face(__name__)
