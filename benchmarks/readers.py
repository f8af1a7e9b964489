"""Whether what goes into the readers is what was meant: small cases that once went wrong, and a fuzz of event tables.

    python benchmarks/readers.py [--tables 3000]

A fuzzed table has doses and a few measurements for each of up to three individuals, in random codings, and random
columns of the vocabulary of NONMEM, Monolix and nlmixr2. A slow checker reads the written file by itself, a row after
the other, and says what was measured and which columns ask for something that is not implemented. A reader must find
the same measurements, doses and limits and name every column that it did not use, or refuse and name a column that asks
for something. Every option that a refusal tells to type is composed with the command line's configuration.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import random
import re
import shlex
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reader_cases import cases, verdict
from record import Figure, stopwatch, write_result

from nlme_sbi.cli import compose_config
from nlme_sbi.io import EventTable, LongTable, WideSheet
from nlme_sbi.types import Censoring, Observations

READERS = {"event_table": EventTable, "long_table": LongTable, "wide_sheet": WideSheet}
GAPS = ("", ".", "NA")
Key = tuple[str, float, str]


# ------------------------------------------------------------------------------------------------ what a reader found


def contents(observations: Observations) -> dict[Key, Any]:
    """Every measurement under its id, time and signal: a value, or the pair of bounds of a censored one; doses and
    resets under their id, time and "dose": lists of kind, amount, rate, interval, additional ones, steady state and
    compartment."""
    found: dict[Key, Any] = {}
    if observations.design.events is not None:
        events = observations.design.events
        told = ("kind", "amount", "rate", "interval", "additional", "steady_state", "compartment")
        for i, e in (events.kind > 0).nonzero().tolist():
            place = observations.ids[i], float(events.time[i, e]), "dose"
            found.setdefault(place, []).append(tuple(round(float(getattr(events, name)[i, e]), 9) for name in told))
    for i, t, c in observations.design.observed.nonzero().tolist():
        key = (observations.ids[i], float(observations.design.times[i, t]), observations.signals[c])
        value: Any = float(observations.values[i, t, c])
        if observations.censoring is not None and int(observations.censoring[i, t, c]) != int(Censoring.NONE):
            value = (float(observations.lower[i, t, c]), float(observations.upper[i, t, c]))
        found[key] = value
    return found


def measured(content: Mapping[Key, Any]) -> dict[Key, Any]:
    """Without the doses."""
    return {key: value for key, value in content.items() if key[2] != "dose"}


def outcome(reader: Any, *, plan: bool = False) -> Any:
    """Measurements and notes, or the exception."""
    try:
        found = reader.plan() if plan else reader.read()
    except Exception as problem:
        return problem
    if not plan:
        return contents(found), found.notes
    there = found.design.observed[..., 0].nonzero().tolist()
    return {(found.ids[i], float(found.design.times[i, t]), ""): None for i, t in there}, found.notes


# ------------------------------------------------------------------------------------------------------- random tables

HARMLESS = ("SEX", "AGE", "STUDY", "DOSE", "TAD", "NTIME", "COMMENT", "RACE", "HT", "ARM")
OF_DOSES = ("RATE", "TINF", "II", "ADDL", "SS")
NONZERO = ("DUR", "CONT", "ALAG")
FLAGS = ("C", "IGNORE", "EXCLUDE", "EXCL", "FLAG", "OUTLIER", "DROP")
BEYOND = ("BLQ", "BLOQ", "BQL", "LLOQFL", "ALQ")
KEEPS = ("INCLUDE", "KEEP")
LIMITS = ("LLOQ", "LOQ")
CHANGING = ("OCC", "OCCASION", "PERIOD", "DATE", "DAT1", "DAY", "VISIT")
ROUTES = ("ADM", "CMT", "ROUTE")
SIGNALS = ("DVID", "YTYPE")
UNITS = ("UNIT", "DVUNIT")


@dataclass
class Written:
    """A table as text, and the options that it is read with."""

    text: str
    options: dict[str, Any] = field(default_factory=dict)


def number(rng: random.Random, value: float) -> str:
    """One of the ways to write a number."""
    forms = [f"{value:g}", f"{value:.4f}", f" {value:g}", f"{value:g} ", f"{value:.6e}"]
    return rng.choice(forms)


def fuzzed(rng: random.Random) -> Written:
    """A random event table."""
    rows: list[dict[str, str]] = []
    ids = rng.sample(["1", "2", "10", "A", "b7", "007"], rng.randint(1, 3))
    with_evid, with_mdv, with_cens = rng.random() < 0.85, rng.random() < 0.5, rng.random() < 0.35
    several = rng.choice([None, None, None, None, None, "YTYPE", "DVID", "CMT"])
    for who in ids:
        times = sorted(rng.sample(range(1, 30), rng.randint(1, 4)))
        rows.append({"ID": who, "TIME": "0", "DV": rng.choice([".", "", "0"]), "AMT": number(rng, 100), "EVID": "1"})
        rows[-1] |= {"MDV": rng.choice(["1", "1", ""]), "CENS": "0", "LIMIT": "."}
        for time in times:
            row = {"ID": who, "TIME": number(rng, time), "DV": number(rng, rng.randint(1, 99) / 4)}
            row |= {"AMT": rng.choice([".", "", "0", "0.0"]), "EVID": "0", "MDV": rng.choice(["0", "0", "0", "1", "."])}
            row |= {
                "CENS": rng.choice(["0", "0", "0", ".", "1", "1", "-1"]),
                "LIMIT": rng.choice([".", "", ".", "", "0", "0.1", "500"]),
            }
            rows.append(row)
        for row in rows[-len(times) :]:
            if several is not None:
                row[several] = rng.choice(["1", "2", "1.0", "2"])
    columns = ["ID", "TIME", "DV", "AMT"]
    columns += [name for name, there in (("EVID", with_evid), ("MDV", with_mdv)) if there]
    if with_cens:
        columns += ["CENS"] + (["LIMIT"] if rng.random() < 0.6 else [])
    if several is not None:
        columns.append(several)
        for row in rows:
            row.setdefault(several, rng.choice([".", "1"]))
    others = [*HARMLESS, *OF_DOSES, *NONZERO, *FLAGS, *BEYOND, *KEEPS, *LIMITS, *CHANGING, *ROUTES, *SIGNALS, *UNITS]
    for name in rng.sample(others, rng.randint(0, 4)):
        if name not in columns:
            columns.append(name)
            _fill(rng, rows, name)
    if rng.random() < 0.05:  # a second dose
        again = {**rows[-1], "TIME": "40", "DV": ".", "AMT": "50", "EVID": "1", "MDV": "1", "CENS": "0", "LIMIT": "."}
        rows.append(again)
    if rng.random() < 0.06:  # another event, a reset, one of RxODE's codes
        rng.choice(rows)["EVID"] = rng.choice(["2", "3", "4", "10101", "201"])
    if rng.random() < 0.05:
        rng.shuffle(rows)
    if rng.random() < 0.05 and ids[0].isdigit():
        rows[-1]["ID"] = f"{ids[0]}.0"
    rng.shuffle(columns)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    case = rng.choice([str.upper, str.lower, str.title])
    writer.writerow([case(name) for name in columns])
    writer.writerows([[row.get(name, "") for name in columns] for row in rows])
    options: dict[str, Any] = {}
    if several is not None and rng.random() < 0.6:
        options["signal_levels"] = rng.choice([{1: "one"}, {"1": "one", "2": "two"}])
    return Written(file.getvalue(), options)


def _fill(rng: random.Random, rows: list[dict[str, str]], name: str) -> None:
    """A column that asks for nothing, or now and then for something."""
    asks = rng.random() < 0.2
    nothing = rng.choice([".", "", "0", "0.0"])
    for row in rows:
        row[name] = nothing
    chosen = rng.choice(rows)
    if name in HARMLESS:
        for row in rows:
            row[name] = rng.choice(["1", "2", "x", "70.5", "."])
    elif name in CHANGING:
        for row in rows:
            row[name] = rng.choice(["1", "1.0"])
        if asks:
            chosen[name] = "2"
    elif name in UNITS:
        for row in rows:
            row[name] = "mg/L"
        if asks:
            chosen[name] = "ug/L"
    elif name in ROUTES:
        for row in rows:
            row[name] = rng.choice(["1", "0", "."]) if row["EVID"] == "1" else "1"
            if asks and row["EVID"] == "1":
                row[name] = rng.choice(["2", "depot", "iv"])
    elif name in OF_DOSES:
        for row in rows:
            if row["EVID"] == "1" and rng.random() < 0.7:
                row[name] = rng.choice({"RATE": ["5", "-2", "2.5"], "II": ["12", "24"]}.get(name, ["1", "2", "0"]))
        if asks:
            chosen[name] = rng.choice(["1", "2.5", "-1"])
    elif name in KEEPS:
        for row in rows:
            row[name] = rng.choice(["1", "Y"])
        if asks:
            chosen[name] = rng.choice(["0", "", "N"])
    elif name in LIMITS:
        for row in rows:
            row[name] = "3.5" if asks else "0.01"
    elif name in SIGNALS:
        for row in rows:
            row[name] = "1"
        if asks:
            chosen[name] = "2"
    elif asks:
        marks = ["1", "2.5", "1.0", "Y"] if name in FLAGS else ["1", "2.5"]
        chosen[name] = {"RATE": "-2", "C": "C"}.get(name, rng.choice(marks))


# --------------------------------------------------------------------------------------------------- the slow checker


@dataclass
class Meaning:
    """What a file means: measurements, doses, the columns (or words) that ask for something, and unused columns."""

    values: dict[Key, Any] = field(default_factory=dict)
    doses: dict[Key, list[tuple[float, ...]]] = field(default_factory=dict)
    asking: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)


def plain(cell: str) -> str:
    """A cell in one form: gaps are "", numbers as short as they get."""
    cell = cell.strip()
    if cell in GAPS:
        return ""
    try:
        return f"{float(cell):g}"
    except ValueError:
        return cell


def checked(written: Written) -> Meaning:
    """What the file says, read without any of the reader's code."""
    meaning = Meaning()
    lines = list(csv.reader(io.StringIO(written.text)))
    original = {name.upper(): name for name in lines[0]}
    rows = [dict(zip(original, [cell.strip() for cell in line], strict=True)) for line in lines[1:]]
    forms = {(row["ID"], plain(row["ID"])) for row in rows}
    if any(a != b and x == y and _is_number(a) for a, x in forms for b, y in forms):
        meaning.asking.add("only in form")
    levels = {str(plain(str(key))): name for key, name in written.options.get("signal_levels", {}).items()}
    signal_column = _signal_column(rows, original, levels)
    seen: dict[str, float] = {}
    closed: set[str] = set()
    last = None
    for row in rows:
        who, time = row["ID"], float(row["TIME"])
        if who != last:
            if who in closed:
                meaning.asking |= {"return to an individual"}
            closed.add(who)
        last = who
        if time < seen.get(who, -math.inf):
            meaning.asking |= {"go back"}
        seen[who] = time
        _one_row(row, who, time, meaning, original, levels, signal_column)
    _whole(rows, meaning, original, signal_column, levels)
    return meaning


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_dose(row: Mapping[str, str]) -> bool:
    if "EVID" in row:
        return plain(row["EVID"]) in ("1", "4", "101", "201")
    return plain(row["AMT"]) not in ("", "0")


def is_measurement(row: Mapping[str, str]) -> bool:
    event = plain(row["EVID"]) == "0" if "EVID" in row else not is_dose(row)
    return event and plain(row.get("MDV", "")) != "1"


def _signal_column(rows: list[dict[str, str]], there: Iterable[str], levels: Mapping[str, str]) -> str | None:
    """The column that distinguishes signals: the first that has the levels asked for, else the first with several."""
    first = None
    for name in ("DVID", "YTYPE", "CMT"):
        if name in there:
            empty = ("", "0") if name == "CMT" else ("",)
            found = {"" if plain(row[name]) in empty else plain(row[name]) for row in rows if is_measurement(row)}
            if levels and set(levels) <= found:
                return name
            if first is None and len(found) > 1:
                first = name
    return first


def _one_row(
    row: dict[str, str],
    who: str,
    time: float,
    meaning: Meaning,
    original: Mapping[str, str],
    levels: Mapping[str, str],
    signal_column: str | None,
) -> None:
    if "EVID" in row and plain(row["EVID"]) not in ("0", "1", "2", "3", "4", "101", "201"):
        meaning.asking |= {"EVID", original["EVID"]}
    for name in (*NONZERO, *FLAGS, *BEYOND):
        if name in row and plain(row[name]) not in ("", "0"):
            meaning.asking.add(original[name])
    is_reset = "EVID" in row and plain(row["EVID"]) in ("3", "4")
    if is_reset and not is_dose(row):
        meaning.doses.setdefault((who, time, "dose"), []).append((3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    if not is_dose(row):
        of_doses = [name for name in OF_DOSES if name != "II" and plain(row.get(name, "")) not in ("", "0")]
        meaning.asking |= {original[name] for name in of_doses}
        if plain(row["AMT"]) not in ("", "0"):
            meaning.asking.add("amount")
        if is_reset and plain(row.get("CENS", "")) in ("1", "-1"):
            meaning.asking.add(original["CENS"])
    if is_dose(row):
        meaning.doses.setdefault((who, time, "dose"), []).append(_dose(row, meaning, original, is_reset=is_reset))
        if plain(row.get("CENS", "")) in ("1", "-1"):
            meaning.asking.add(original["CENS"])
        return
    if not is_measurement(row):
        return
    signal = "DV"
    if signal_column is not None:
        level = plain(row[signal_column])
        if level == "" or not levels:
            meaning.asking.add(original[signal_column])
        elif level not in levels:
            return
        signal = levels.get(level, signal)
    value = plain(row["DV"])
    side, end = plain(row.get("CENS", "")), plain(row.get("LIMIT", ""))
    if side in ("1", "-1") and "CENS" in row:
        limit = float(end) if end else math.nan
        if value == "":
            meaning.asking.add(original["CENS"])
            return
        exact = float(row["DV"])
        if (side == "1" and limit >= exact) or (side == "-1" and limit <= exact):
            meaning.asking.add(original["LIMIT"])
        bounds = (limit if end else -math.inf, exact) if side == "1" else (exact, limit if end else math.inf)
        meaning.values[who, time, signal] = bounds
    elif value != "":
        if (who, time, signal) in meaning.values:
            meaning.asking.add("repeat")
        meaning.values[who, time, signal] = float(row["DV"])


def _dose(
    row: Mapping[str, str], meaning: Meaning, original: Mapping[str, str], *, is_reset: bool
) -> tuple[float, ...]:
    """Kind, amount, rate, interval, additional ones, steady state and compartment of a dose."""
    rate, lasting, every, more, steady = (float(plain(row.get(name, "")) or 0) for name in OF_DOSES)
    text = plain(row["AMT"])
    constant = rate > 0 and steady > 0 and text in ("", "0")
    if text == "" and not constant:
        meaning.asking.add("amount")
    amount = float(text or 0)
    wrong = {
        "RATE": (rate < 0 and rate not in (-1, -2)) or (rate > 0 and amount == 0 and not constant),
        "TINF": lasting < 0 or (lasting > 0 and rate != 0),
        "II": every < 0,
        "ADDL": more < 0 or not more.is_integer() or (more > 0 and every == 0),
        "SS": steady not in (0, 1, 2) or (steady > 0 and every == 0 and not constant),
    }
    meaning.asking |= {original[name] for name, is_wrong in wrong.items() if is_wrong}
    code = plain(row.get("EVID", ""))
    compartments = {1.0} if code not in ("101", "201") else {float(code[0])}
    said = [plain(row[name]) for name in ROUTES if name in row and plain(row[name]) not in ("", "0")]
    names = {original[name] for name in ROUTES if name in row}
    if any(not level.isdigit() for level in said):
        meaning.asking |= names
    elif said:
        numbers = {float(level) for level in said}
        if len(numbers) > 1 or (code in ("101", "201") and numbers != compartments):
            meaning.asking |= names
        compartments = numbers
    kind = 4.0 if is_reset else 1.0
    rate = amount / lasting if lasting > 0 else rate
    return (kind, amount, round(rate, 9), every, more, steady, min(compartments))


def _whole(
    rows: list[dict[str, str]],
    meaning: Meaning,
    original: Mapping[str, str],
    signal_column: str | None,
    levels: Mapping[str, str],
) -> None:
    """Rules about several rows."""
    for name in CHANGING:
        for who in {row["ID"] for row in rows}:
            own = {plain(row[name]) for row in rows if row["ID"] == who and name in row} - {""}
            if len(own) > 1:
                meaning.asking.add(original[name])
    for name in KEEPS:
        marked = [plain(row[name]) not in ("", "0", "N") for row in rows if name in row]
        if any(marked) and not all(marked):
            meaning.asking.add(original[name])
    for name in FLAGS:  # the same mark on every row tells nothing apart
        marks = {plain(row[name]) for row in rows if name in row}
        if len(marks) == 1:
            meaning.asking.discard(original[name])
    for name in LIMITS:
        if name in original and "CENS" not in original:
            values = [row for row in rows if is_measurement(row) and plain(row["DV"])]
            below = [row for row in values if float(row["DV"]) <= float(row[name])]
            if any(not levels or plain(row[signal_column or "ID"]) in levels for row in below):
                meaning.asking.add(original[name])
    for name in UNITS:
        if len({plain(row[name]) for row in rows if name in row} - {""}) > 1:
            meaning.asking.add(original[name])
    if levels and signal_column is None:
        meaning.asking |= {"signal_levels", *(original[name] for name in ("DVID", "YTYPE", "CMT") if name in original)}
    elif levels and not set(levels) <= {plain(row[signal_column]) for row in rows if is_measurement(row)}:
        meaning.asking |= {"signal_levels"}
    for name in ("DVID", "YTYPE", "CMT"):  # another column that divides one signal
        if signal_column is not None and name in original and name != signal_column:
            pairs = {
                (plain(row[signal_column]), "" if name == "CMT" and plain(row[name]) == "0" else plain(row[name]))
                for row in rows
                if is_measurement(row) and (not levels or plain(row[signal_column]) in levels)
            }
            if len(pairs) > len({level for level, _ in pairs}):
                meaning.asking |= {original[name], original[signal_column]}
    everybody = {row["ID"] for row in rows}
    if everybody - {who for (who, _, _), given in meaning.doses.items() if any(dose[0] != 3.0 for dose in given)}:
        meaning.asking.add("have no dose")
    if everybody - {who for who, _, _ in meaning.values}:
        meaning.asking.add("have no observation")
    read = {"ID", "TIME", "DV", "AMT", "EVID", "MDV", "CENS", *OF_DOSES, *ROUTES, *SIGNALS}
    read |= {"LIMIT"} if "CENS" in original else set()
    meaning.unused = {written for name, written in original.items() if name not in read}


# ------------------------------------------------------------------------------------------------------------ judging


def judged(written: Written, found: Any) -> str:
    """ "" where the reader did right, else what it did."""
    meaning = checked(written)
    if isinstance(found, Exception):
        if not isinstance(found, ValueError):
            return "traceback"
        if not meaning.asking:
            return "needless refusal"
        return "" if any(word.casefold() in str(found).casefold() for word in meaning.asking) else "misleading refusal"
    if meaning.asking:
        return "silently dropped"
    values, notes = found
    if values != {**meaning.values, **meaning.doses}:
        return "other values"
    named = re.split(r"[:,]\s*", " , ".join(note for note in notes if note.startswith("not used")))
    return "" if meaning.unused <= {name.strip() for name in named} else "unused column not named"


def typed_options(message: str) -> list[str]:
    """Every option that a message tells to type, as a shell hands it over."""
    return [option for together in typed_together(message) for option in together]


def typed_together(message: str) -> list[list[str]]:
    """The same, those that stand side by side in one list: other lists are other ways."""
    one = r"(?:'data\.(?:[^']|'\"'\"')*'|data\.[\w.]+=[^\s,;]*[\w\]\"])"
    return [shlex.split(found) for found in re.findall(f"{one}(?: {one})*", message)]


def composes(option: str, group: str) -> bool:
    """Whether the command line takes an option with this group of data."""
    try:
        compose_config("fit_population", [f"data={group}", "data.path=t.csv", option])
    except ValueError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compose", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    wrong: Counter[str] = Counter()
    remedies: dict[str, str] = {}
    read = refused = 0
    with tempfile.TemporaryDirectory() as folder, stopwatch() as spent:
        every = cases()
        for case in every:
            path = Path(folder) / case.name
            path.write_bytes(case.content)
            found = outcome(READERS[case.reader](path, **case.options), plan=case.plan)
            problem = verdict(case, found if isinstance(found, Exception) else (measured(found[0]), found[1]))
            if problem:
                wrong["case"] += 1
                print(f"{case.name}: {problem}")
            if isinstance(found, ValueError):
                remedies |= {_shape(option): option for option in typed_options(str(found))}
        path = Path(folder) / "fuzzed.csv"
        for place in range(options.tables):
            written = fuzzed(random.Random(options.seed + place))
            path.write_text(written.text)
            found = outcome(EventTable(path, **written.options))
            problem = judged(written, found)
            if problem:
                wrong[problem] += 1
                if wrong[problem] <= 3:
                    print(f"table {options.seed + place}: {problem}\n{written.text}{written.options}\n{found}")
                    print(checked(written))
                    if isinstance(found, Exception) and not isinstance(found, ValueError):
                        traceback.print_exception(found)
            if isinstance(found, ValueError):
                refused += 1
                remedies |= {_shape(option): option for option in typed_options(str(found))}
            else:
                read += 1
    untypable = [option for option in remedies.values() if options.compose and not composes(option, "event_table")]
    for option in untypable:
        print(f"cannot be typed: {option}")
    silent = wrong["silently dropped"] + wrong["other values"] + wrong["unused column not named"]
    figures: dict[str, Figure] = {
        "cases": (len(every), "small files that once went wrong"),
        "cases_wrong": (wrong["case"], "of these"),
        "fuzzed": (options.tables, "random event tables"),
        "fuzzed_read": (read, "of these, the others are refused"),
        "silently_dropped": (silent, "tables read though a column asks for more, read otherwise, or columns not named"),
        "tracebacks": (wrong["traceback"], "tables that ended in an error that is no refusal"),
        "needless_refusals": (wrong["needless refusal"], "tables refused though nothing in them asks for more"),
        "misleading_refusals": (wrong["misleading refusal"], "refusals that name none of the columns that ask"),
        "remedies": (len(remedies), "different options that refusals tell to type"),
        "remedies_refused": (len(untypable), "of these, refused by the command line"),
        "seconds": (spent.wall, "s"),
    }
    write_result("readers", figures, title="Small tables that once went wrong, and random event tables.")


def _shape(option: str) -> str:
    """An option without its numbers: one of each kind is tried."""
    return re.sub(r"[0-9.]+", "0", option)


if __name__ == "__main__":
    main()
