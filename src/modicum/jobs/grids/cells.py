"""The cells of a grid: what the axes, the seeds and the choices make of each stage of the template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from modicum.errors import RecipeError, did_you_mean
from modicum.jobs.grids.axes import FIRST, LAST, PREVIOUS, SEED, TUNE, apply, of_stage, read_axes
from modicum.jobs.grids.parts import At, Cell, Choice, Template, label
from modicum.jobs.stages.references import PREFIX
from modicum.recipe import Data
from modicum.record import digest

OWN = ("name", "over", "role", "start", "resources")  # keys of a stage that are the grid's
FORM = re.compile(r"stage:(?P<stage>[\w-]+)(?:\[(?P<places>[^\]]*)\])?(?:/(?P<output>.+))?")
NAMED = ("models", "experts")  # mappings from a name of the user's to a model


class Plan:
    """All cells of a grid, each after those that it uses.

    Args:
        stages: The template.
        axes: See :func:`~modicum.jobs.grids.axes.read_axes`.
        seeds: Of all stages that have none of their own.
        choose: For each axis that is chosen, the stage whose scores decide, and over which axes they are averaged.

    Raises:
        RecipeError: The template contradicts itself.
    """

    def __init__(
        self,
        stages: Sequence[Data],
        axes: Mapping[str, Any],
        seeds: Sequence[int],
        choose: Mapping[str, Any],
    ) -> None:
        self.axes = read_axes(axes)
        self.seeds = tuple(seeds)
        self.choose = choose
        self.templates: dict[str, Template] = {}
        for position, stage in enumerate(stages):
            template = self._template(position, stage)
            if template.name in self.templates:
                raise RecipeError(f"Two stages are called {template.name!r}. Rename one.")
            self.templates[template.name] = template
        self._check_axes()
        self.cells: dict[str, Cell] = {}
        self.choices: dict[str, Choice] = {}
        self._at: dict[tuple[str, tuple[tuple[str, Any], ...]], Cell] = {}
        self._open: set[Any] = set()
        self._contents: dict[str, Cell] = {}
        for template in self.templates.values():
            for at in self._places(template):
                self._cell(template, at)

    # ------------------------------------------------------------------ the template

    def _template(self, position: int, stage: Data) -> Template:
        name = stage.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise RecipeError(f"stages[{position}] needs a name of letters, digits, - and _; got {name!r}.")
        over = stage.get("over", [])
        if not isinstance(over, list) or not all(isinstance(axis, str) for axis in over):
            raise RecipeError(f"stage {name!r}: over is {over!r:.60}, expected a list of axes.")
        for axis in over:
            if axis not in self.axes:
                raise RecipeError(f"stage {name!r}: there is no axis {axis!r}. {did_you_mean(axis, self.axes)}")
        if len(set(over)) < len(over):
            raise RecipeError(f"stage {name!r}: an axis stands twice in over. Drop one.")
        if stage.get("job") in ("grid", "pipeline"):
            raise RecipeError(f"stage {name!r} is a {stage['job']}. Put its stages into this grid.")
        resources = stage.get("resources") or {}
        known = ("cpus", "gpus", "memory", "hours")
        if not isinstance(resources, Mapping) or not all(
            isinstance(v, int | float) and v >= 0 for v in resources.values()
        ):
            raise RecipeError(
                f"stage {name!r}: resources are {resources!r:.60}, expected numbers for {', '.join(known)}."
            )
        for key in resources:
            if key not in known:
                raise RecipeError(f"stage {name!r}: there is no resource {key!r}. {did_you_mean(key, known)}")
        for key in ("role", "start"):
            if not isinstance(stage.get(key, ""), str):
                raise RecipeError(f"stage {name!r}: {key} is {stage[key]!r:.60}, expected a word.")
        recipe = {key: value for key, value in stage.items() if key not in OWN}
        return Template(
            name, tuple(over), recipe, SEED not in stage, stage.get("role"), stage.get("start"), dict(resources)
        )

    def _check_axes(self) -> None:
        used = {axis for template in self.templates.values() for axis in template.over}
        for axis, values in self.axes.items():
            if axis not in used:
                raise RecipeError(f"axes.{axis}: no stage is over it. Add over: [{axis}] to a stage, or drop the axis.")
            for name, value in values.items():
                for path in (*value.sets, *(path for knobs in value.variants.values() for path in knobs)):
                    self._check_path(axis, name, path)
            if any(value.variants for value in values.values()) and axis not in self.choose:
                raise RecipeError(
                    f"axes.{axis} has knobs to tune. Say by which stage: choose: {{{axis}: {{by: STAGE}}}}."
                )
        for axis, choice in self.choose.items():
            if axis not in self.axes:
                raise RecipeError(f"choose: there is no axis {axis!r}. {did_you_mean(axis, self.axes)}")
            judge = self.templates.get(choice.by)
            if judge is None:
                raise RecipeError(
                    f"choose.{axis}: there is no stage {choice.by!r}. {did_you_mean(choice.by, self.templates)}"
                )
            if judge.recipe.get("job") != "evaluate":
                raise RecipeError(f"choose.{axis}: stage {choice.by!r} evaluates nothing. Name one of job evaluate.")
            if axis not in judge.over:
                raise RecipeError(f"choose.{axis}: stage {choice.by!r} is not over {axis}. Add it there.")
            for other in choice.across:
                if other not in self._keys(judge):
                    raise RecipeError(
                        f"choose.{axis}.across: {choice.by!r} has no axis {other!r}. "
                        f"{did_you_mean(other, self._keys(judge))}"
                    )

    def _check_path(self, axis: str, name: str, path: str) -> None:
        over = [template for template in self.templates.values() if axis in template.over]
        set_in = {t.name: of_stage({path: None}, t.name, t.keys, self.templates) for t in over}
        if any(SEED in set_in[t.name] and t.seeded for t in over):
            raise RecipeError(f"axes.{axis}.{name}: seeds have a key of their own. Write seeds: [0, 1, 2].")
        if any(set_in.values()):
            return
        first = path.partition(".")[0]
        known = {template.name for template in over}.union(*(template.keys for template in over))
        raise RecipeError(f"axes.{axis}.{name}: no stage over {axis} has {first!r}. {did_you_mean(first, known)}")

    @cached_property
    def _tuned(self) -> dict[str, set[str]]:
        """For each stage the axes whose variants it has cells for: those of judges and of what judges use."""
        found: dict[str, set[str]] = {name: set() for name in self.templates}
        for axis, choice in self.choose.items():
            if not any(value.variants for value in self.axes[axis].values()):
                continue
            waiting = [choice.by]
            while waiting:
                name = waiting.pop()
                if axis in found[name] or axis not in self.templates[name].over:
                    continue
                found[name].add(axis)
                waiting += [
                    match["stage"] for match in _matches(self.templates[name].recipe) if match["stage"] in found
                ]
        return found

    def _keys(self, template: Template) -> list[str]:
        keys = []
        for axis in template.over:
            keys += [axis, f"{axis}.tune"] if axis in self._tuned[template.name] else [axis]
        return [*keys, SEED] if template.seeded else keys

    def _places(self, template: Template) -> Iterator[At]:
        """Yield the coordinates of a stage's cells."""

        def complete(keys: Sequence[str], at: At) -> Iterator[At]:
            if not keys:
                yield dict(at)
                return
            for value in self._values(keys[0], at):
                yield from complete(keys[1:], at | {keys[0]: value} if value is not None else at)

        yield from complete(self._keys(template), {})

    def _values(self, key: str, at: Mapping[str, Any]) -> Sequence[Any]:
        if key == SEED:
            return self.seeds
        axis, dot, _ = key.rpartition(TUNE)
        if dot:
            return [*self.axes[axis][at[axis]].variants] or [None]
        return [*self.axes[key]]

    # ------------------------------------------------------------------ cells

    def _cell(self, template: Template, at: At) -> Cell:
        place = (template.name, tuple(at.items()))
        if place in self._at:
            return self._at[place]
        if place in self._open:
            raise RecipeError(f"stage {template.name!r} uses itself. Refer to the cell before: [AXIS=previous].")
        self._open.add(place)
        recipe = dict(template.recipe)
        for axis in template.over:
            value = self.axes[axis][str(at[axis])]
            recipe = self._set(template, recipe, axis, str(at[axis]), value.sets)
            if (variant := at.get(f"{axis}.tune")) is not None:
                recipe = self._set(template, recipe, axis, f"{at[axis]}.tune", value.variants[str(variant)])
        if template.seeded:
            recipe["seed"] = at[SEED]
        recipe = self._expanded(recipe, template, at)
        content = digest(recipe)
        name = f"{template.name}-{content[:10]}"
        cell = Cell(name, template.name, at, recipe, template.role, template.resources)
        same = self._contents.setdefault(content, cell)
        if same is not cell and same.stage == cell.stage:
            raise RecipeError(
                f"{same.title!r} and {cell.title!r} are the same run. Drop one, or let an axis of theirs set something."
            )
        if same is not cell:  # another stage has this very run already, such as the first of a chain
            self._open.discard(place)
            self._at[place] = same
            return same
        self._open.discard(place)
        self._at[place] = self.cells[name] = cell
        return cell

    def _set(self, template: Template, recipe: Data, axis: str, value: str, sets: Mapping[str, Any]) -> Data:
        try:
            return apply(recipe, of_stage(sets, template.name, template.keys, self.templates))
        except RecipeError as error:
            problem = str(error).removeprefix("--set ")
            raise RecipeError(f"axes.{axis}.{value} in stage {template.name!r}: {problem}") from None

    def _expanded(self, value: Any, template: Template, at: At, inside: str = "") -> Any:
        """Put cells in the place of references; one that stands for several cells makes several items."""
        if isinstance(value, Mapping):
            found: dict[str, Any] = {}
            for key, item in value.items():
                if not _is_reference(item):
                    found[key] = self._expanded(item, template, at, key)
                    continue
                targets = self._targets(item, template, at)
                for words, reference in targets:
                    # A key such as the name of a model is made as often as there are cells.
                    found[key if len(targets) == 1 else f"{key} {words}"] = reference
                if len(targets) > 1 and inside not in NAMED:
                    self._refuse_several(item, template, targets)
            return found
        if isinstance(value, list):
            items: list[Any] = []
            for item in value:
                if _is_reference(item):
                    items += [reference for _, reference in self._targets(item, template, at)]
                else:
                    items.append(self._expanded(item, template, at))
            return items
        return value

    def _refuse_several(self, item: str, template: Template, targets: Sequence[tuple[str, str]]) -> None:
        raise RecipeError(
            f"stage {template.name!r}: {item} stands for {len(targets)} cells where one is expected. Name one: "
            f"{item.partition('/')[0]}[AXIS=VALUE]."
        )

    def _targets(self, text: str, template: Template, at: At) -> list[tuple[str, str]]:
        """Return the cells and choices that a reference stands for: words that tell them apart, and new references."""
        match = FORM.fullmatch(text)
        if match is None:
            raise RecipeError(
                f"stage {template.name!r}: {text!r} is no reference, expected stage:NAME[AXIS=VALUE]/OUTPUT."
            )
        name = match["stage"]
        names = list(self.templates)
        if name not in self.templates:
            raise RecipeError(f"stage {template.name!r} uses {text!r}, no stage. {did_you_mean(name, names)}")
        target = self.templates[name]
        fixed = self._fixed(text, match["places"], template, target, at)
        if fixed is None:
            if template.start is None:
                raise RecipeError(
                    f"stage {template.name!r}: nothing is previous to its first cell. Set start: a model."
                )
            return [("", template.start)]
        later = names.index(name) >= names.index(template.name)
        if later and PREVIOUS not in (match["places"] or ""):
            raise RecipeError(f"stage {template.name!r} uses {text!r}, no earlier stage. Move it before this one.")
        output = f"/{match['output']}" if match["output"] else ""
        return [(words, f"{PREFIX}{found}{output}") for words, found in self._groups(target, fixed, at)]

    def _fixed(self, text: str, places: str | None, template: Template, target: Template, at: At) -> At | None:
        """Return the coordinates that a reference fixes; ``None`` for what is previous to the first."""
        keys = self._keys(target)
        fixed: At = {key: at[key] for key in keys if key in at}
        for part in filter(None, (part.strip() for part in (places or "").split(","))):
            axis, equals, wanted = part.partition("=")
            if not equals or axis not in keys:
                raise RecipeError(
                    f"stage {template.name!r}: {text!r}: {target.name!r} has no axis {axis!r}. "
                    f"{did_you_mean(axis, keys)}"
                )
            if axis.endswith(TUNE) and axis.removesuffix(TUNE) not in fixed:
                raise RecipeError(
                    f"stage {template.name!r}: {text!r}: name the value of {axis[:-5]!r} before {axis!r}."
                )
            known = [str(value) for value in self._values(axis, fixed)]
            if wanted == PREVIOUS:
                if axis not in at:
                    raise RecipeError(f"stage {template.name!r} is not over {axis}, so nothing is previous to it.")
                place = known.index(str(at[axis]))
                if place == 0:
                    return None
                wanted = known[place - 1]
            wanted = {FIRST: known[0], LAST: known[-1]}.get(wanted, wanted)
            if wanted not in known:
                raise RecipeError(
                    f"stage {template.name!r}: {text!r}: {axis} has no {wanted!r}. {did_you_mean(wanted, known)}"
                )
            fixed[axis] = int(wanted) if axis == SEED else wanted
        return fixed

    def _groups(self, target: Template, fixed: At, at: At) -> Iterator[tuple[str, str]]:
        """Yield what matches the fixed coordinates; cells that differ in what is chosen alone are one choice."""
        chosen = {f"{axis}.tune" for axis in self._tuned[target.name]}
        chosen |= {axis for axis in self.choose if not any(v.variants for v in self.axes[axis].values())}
        chosen -= fixed.keys()
        groups: dict[tuple[tuple[str, Any], ...], list[At]] = {}
        for place in self._places(target):
            if all(place.get(key, value) == value for key, value in fixed.items()):
                shared = {key: value for key, value in place.items() if key not in chosen}
                groups.setdefault(tuple(shared.items()), []).append(place)
        for group, members in groups.items():
            rest = dict(group)
            words = label({key: value for key, value in rest.items() if at.get(key) != value}) or target.name
            if (seed := rest.get(SEED)) is not None and at.get(SEED) != seed:
                words = f"{words} seed {seed}"
            cells = [self._cell(target, place) for place in members]
            yield words, cells[0].name if len(cells) == 1 else self._choice(chosen, rest, cells)

    def _choice(self, chosen: set[str], rest: At, cells: Sequence[Cell]) -> str:
        differing = [key for key in chosen if len({cell.at.get(key) for cell in cells}) > 1]
        if len(differing) > 1:
            raise RecipeError(f"{', '.join(sorted(differing))} are to be chosen at once. Choose one before the other.")
        key = differing[0]
        axis = key.removesuffix(TUNE)
        choice = self.choose[axis]
        judge = self.templates[choice.by]
        judges = []
        for cell in cells:
            wanted = {k: v for k, v in cell.at.items() if k not in choice.across}
            places = [p for p in self._places(judge) if all(p.get(k, v) == v for k, v in wanted.items())]
            judges.append(tuple(self._cell(judge, place).name for place in places))
        name = f"choice-{digest([key, [cell.name for cell in cells], judges])[:10]}"
        found = Choice(name, axis, key, dict(rest), tuple(cell.name for cell in cells), tuple(judges))
        self.choices[name] = found
        return name


def _is_reference(item: object) -> bool:
    return isinstance(item, str) and item.startswith(PREFIX)


def _matches(value: Any) -> Iterator[re.Match[str]]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _matches(item)
    elif isinstance(value, list):
        for item in value:
            yield from _matches(item)
    elif isinstance(value, str) and (match := FORM.fullmatch(value)):
        yield match
