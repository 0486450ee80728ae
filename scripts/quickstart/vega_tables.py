"""Small tables of (label, value) rows, cut and averaged from vega-datasets: yields, weather, jobs, prices, cars."""

import csv
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True)
class Table:
    """One series of numbers, rounded to the digits that are shown."""

    title: str
    category: str  # of the labels: "year", "site"
    quantity: str  # of the values: "barley yield"
    unit: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    in_time: bool = False  # the labels are in order of time: a line chart is suitable
    shares: bool = False  # the values add up to a whole: a pie chart is suitable

    def show(self, value: float) -> str:
        """A value as text: '12', '3.5', '135450'."""
        return f"{value:.10g}"

    def shown(self, row: int) -> str:
        """The value of a row as text."""
        return self.show(self.values[row])


def _table(
    title: str, category: str, quantity: str, unit: str, rows: Iterable[tuple[str, float]], **kind: bool
) -> Table:
    pairs = [(label, value) for label, value in rows if value == value]
    largest = max(abs(value) for _, value in pairs)
    decimals = 0 if largest >= 100 else 1 if largest >= 5 else 2
    values = tuple(float(round(value, decimals)) for _, value in pairs)
    return Table(title, category, quantity, unit, tuple(label for label, _ in pairs), values, **kind)


def _json(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / name).read_text(encoding="utf-8"))
    return rows


def _csv(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _windows(rows: list[tuple[str, float]], length: int, step: int) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    for start in range(0, len(rows) - length + 1, step):
        part = rows[start : start + length]
        yield f"{part[0][0]}-{part[-1][0]}", part


@lru_cache(maxsize=1)
def read_tables(folder: Path) -> tuple[Table, ...]:
    """All tables, in a fixed order. `folder` is the cache's vega_datasets."""
    parts = (
        _barley,
        _iowa,
        _employment,
        _cars,
        _crimea,
        _wheat,
        _driving,
        _stocks,
        _weather,
        _temperatures,
        _iris,
        _airports,
    )
    return tuple(table for part in parts for table in part(folder))


def _barley(folder: Path) -> Iterator[Table]:
    rows = _json(folder, "barley.json")
    for year in (1931, 1932):
        for key, other in (("variety", "site"), ("site", "variety")):
            for name in sorted({row[key] for row in rows}):
                chosen = [(row[other], row["yield"]) for row in rows if row["year"] == year and row[key] == name]
                title = f"Barley yield, {name}, {year}"
                yield _table(title, other, "yield", "bushels per acre", chosen)


def _iowa(folder: Path) -> Iterator[Table]:
    rows = _csv(folder, "iowa-electricity.csv")
    for year in sorted({row["year"][:4] for row in rows}):
        chosen = [(row["source"], float(row["net_generation"]) / 1000) for row in rows if row["year"].startswith(year)]
        title = f"Electricity generated in Iowa, {year}"
        yield _table(title, "source", "generation", "million MWh", chosen, shares=True)
    for source in sorted({row["source"] for row in rows}):
        series = [(row["year"][:4], float(row["net_generation"]) / 1000) for row in rows if row["source"] == source]
        for span, part in _windows(series, 8, 3):
            title = f"Electricity from {source.lower()} in Iowa, {span}"
            yield _table(title, "year", "generation", "million MWh", part, in_time=True)


_INDUSTRIES = {
    "construction": "Construction",
    "manufacturing": "Manufacturing",
    "retail_trade": "Retail trade",
    "information": "Information",
    "financial_activities": "Finance",
    "education_and_health_services": "Education and health",
    "leisure_and_hospitality": "Leisure",
    "government": "Government",
}


def _employment(folder: Path) -> Iterator[Table]:
    rows = [row for row in _csv(folder, "us-employment.csv") if row["month"][5:7] == "01"]
    for row in rows:
        chosen = [(name, float(row[key]) / 1000) for key, name in _INDUSTRIES.items()]
        yield _table(f"US jobs by industry, January {row['month'][:4]}", "industry", "employment", "millions", chosen)
        yield _table(
            f"Jobs in four US industries, {row['month'][:4]}",
            "industry",
            "employment",
            "millions",
            chosen[::2],
            shares=True,
        )
    for key, name in _INDUSTRIES.items():
        series = [(row["month"][:4], float(row[key]) / 1000) for row in rows]
        for span, part in _windows(series, 7, 3):
            yield _table(f"US jobs: {name.lower()}, {span}", "year", "employment", "millions", part, in_time=True)


def _cars(folder: Path) -> Iterator[Table]:
    rows = [row for row in _json(folder, "cars.json") if row["Miles_per_Gallon"] and row["Horsepower"]]
    names = {"Miles_per_Gallon": ("fuel economy", "miles per gallon"), "Horsepower": ("power", "horsepower")}
    names |= {"Weight_in_lbs": ("weight", "pounds"), "Acceleration": ("time to 60 mph", "seconds")}
    by_year: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_year[row["Year"][:4]].append(row)
    for year, chosen in sorted(by_year.items()):
        counts = sorted(Counter(row["Origin"] for row in chosen).items())
        yield _table(f"Car models of {year} by origin", "origin", "number of models", "", counts, shares=True)
        for key, (quantity, unit) in names.items():
            means = [(origin, _mean(r[key] for r in chosen if r["Origin"] == origin)) for origin, _ in counts]
            yield _table(f"Mean {quantity} of cars, {year}", "origin", quantity, unit, means)
    for key, (quantity, unit) in names.items():
        for origin in ("USA", "Japan", "Europe"):
            series = [
                (year, _mean(row[key] for row in chosen if row["Origin"] == origin))
                for year, chosen in sorted(by_year.items())
                if any(row["Origin"] == origin for row in chosen)
            ]
            for span, part in _windows(series, 7, 4):
                yield _table(f"Mean {quantity}, {origin} cars, {span}", "year", quantity, unit, part, in_time=True)


def _crimea(folder: Path) -> Iterator[Table]:
    rows = _json(folder, "crimea.json")
    for year in ("1854", "1855"):
        chosen = [row for row in rows if row["date"].startswith(year)]
        for key in ("disease", "wounds"):
            series = [(MONTHS[int(row["date"][5:7]) - 1], float(row[key])) for row in chosen]
            for span, part in _windows(series, 6, 3):
                title = f"Deaths from {key}, Crimean War, {span} {year}"
                yield _table(title, "month", "deaths", "", part, in_time=True)


def _wheat(folder: Path) -> Iterator[Table]:
    rows = _json(folder, "wheat.json")
    for key, title in (("wheat", "Price of a quarter of wheat"), ("wages", "Weekly wages of a mechanic")):
        series = [(row["year"], float(row[key])) for row in rows if row.get(key)]
        for span, part in _windows(series, 8, 5):
            yield _table(
                f"{title}, {span}",
                "year",
                "price" if key == "wheat" else "wage",
                "shillings",
                part,
                in_time=True,
            )


def _driving(folder: Path) -> Iterator[Table]:
    rows = sorted(_json(folder, "driving.json"), key=lambda row: row["year"])
    for key, quantity, unit in (
        ("miles", "distance", "miles per person"),
        ("gas", "gas price", "dollars per gallon"),
    ):
        title = "Miles driven per person" if key == "miles" else "Price of gasoline"
        for span, part in _windows([(str(row["year"]), float(row[key])) for row in rows], 8, 5):
            yield _table(f"{title} in the US, {span}", "year", quantity, unit, part, in_time=True)


def _stocks(folder: Path) -> Iterator[Table]:
    rows = [row for row in _csv(folder, "stocks.csv") if row["date"].startswith("Jan")]
    for symbol in sorted({row["symbol"] for row in rows}):
        series = [(row["date"].split()[-1], float(row["price"])) for row in rows if row["symbol"] == symbol]
        for span, part in _windows(series, 6, 2):
            yield _table(f"{symbol} stock price, {span}", "year", "price", "dollars", part, in_time=True)
    for year in sorted({row["date"].split()[-1] for row in rows}):
        chosen = [(row["symbol"], float(row["price"])) for row in rows if row["date"].endswith(year)]
        yield _table(f"Stock prices, January {year}", "company", "price", "dollars", chosen)


def _weather(folder: Path) -> Iterator[Table]:
    rows = _csv(folder, "seattle-weather.csv")
    for year in ("2012", "2013", "2014", "2015"):
        chosen = [row for row in rows if row["date"].startswith(year)]
        counts = sorted(Counter(row["weather"] for row in chosen).items())
        yield _table(f"Weather in Seattle, {year}", "weather", "number of days", "days", counts, shares=True)
        months = {month: [r for r in chosen if int(r["date"][5:7]) == row + 1] for row, month in enumerate(MONTHS)}
        rain = [(month, sum(float(row["precipitation"]) for row in part)) for month, part in months.items()]
        wind = [(month, _mean(float(row["wind"]) for row in part)) for month, part in months.items()]
        high = [(month, _mean(float(row["temp_max"]) for row in part)) for month, part in months.items()]
        for start in (0, 6):
            span = f"{MONTHS[start]}-{MONTHS[start + 5]} {year}"
            half = slice(start, start + 6)
            yield _table(f"Rain in Seattle, {span}", "month", "rain", "mm", rain[half], in_time=True)
            yield _table(f"Mean wind in Seattle, {span}", "month", "wind", "m/s", wind[half], in_time=True)
            yield _table(f"Mean high in Seattle, {span}", "month", "temperature", "degrees C", high[half], in_time=True)


def _temperatures(folder: Path) -> Iterator[Table]:
    for name, city in (("seattle-temps.csv", "Seattle"), ("sf-temps.csv", "San Francisco")):
        by_month: dict[int, list[float]] = defaultdict(list)
        for row in _csv(folder, name):
            by_month[int(row["date"][5:7])].append(float(row["temp"]))
        series = [(MONTHS[month - 1], _mean(values)) for month, values in sorted(by_month.items())]
        for span, part in _windows(series, 6, 2):
            title = f"Mean temperature in {city}, {span} 2010"
            yield _table(title, "month", "temperature", "degrees F", part, in_time=True)


def _iris(folder: Path) -> Iterator[Table]:
    rows = _json(folder, "iris.json")
    for part in ("sepal", "petal"):
        for side in ("Length", "Width"):
            means = [
                (kind, _mean(row[part + side] for row in rows if row["species"] == kind))
                for kind in ("setosa", "versicolor", "virginica")
            ]
            yield _table(f"Iris flowers: mean {part} {side.lower()}", "species", f"{part} {side.lower()}", "cm", means)


def _airports(folder: Path) -> Iterator[Table]:
    counts = Counter(row["state"] for row in _csv(folder, "airports.csv") if row["state"] not in ("", "NA"))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for start in range(0, 40, 5):
        chosen = sorted(ranked[start : start + 5])
        yield _table("Airports in five US states", "state", "number of airports", "", chosen)


def shuffled(tables: Iterable[Table], seed: int, purpose: str) -> list[Table]:
    """The tables in an order that depends on seed and purpose only."""
    order = list(tables)
    random.Random(f"{seed}/{purpose}").shuffle(order)
    return order
