#!/usr/bin/env python3
"""Writes the generated evaluation slices: eval/slices/json.txt and digits.txt. The other slices are written by hand.

usage: scripts/slices.py        standard library only; the same bytes in every run
"""
import json
import random
from datetime import date, timedelta
from pathlib import Path

OUT = Path(__file__).parent.parent / "eval" / "slices"
NAMES = "Ada Bruno Chiara Dmitri Elif Farid Greta Hugo Ines Jonas Keiko Lars Mina Nils Olga Pavel".split()
CITIES = "Aarhus Bilbao Cork Dresden Essen Faro Ghent Haifa Izmir Jaén Kiel Lund".split()
GOODS = "bolt bracket cable clamp fuse gasket hinge hose nut relay rivet spring valve washer".split()


def order(r, number):
    lines = [
        {"sku": f"{r.choice(GOODS)[:3].upper()}-{r.randint(100, 9999):04}", "qty": r.randint(1, 40),
         "unit_price": round(r.uniform(0.2, 90), 2), "backorder": r.random() < 0.2}
        for _ in range(r.randint(1, 3))
    ]
    return {
        "id": f"ord_{number:06}",
        "customer": {"name": r.choice(NAMES), "city": r.choice(CITIES), "vip": r.random() < 0.3},
        "placed": (date(2024, 1, 1) + timedelta(r.randint(0, 700))).isoformat(),
        "lines": lines,
        "total": round(sum(line["qty"] * line["unit_price"] for line in lines), 2),
        "note": r.choice([None, "leave at the gate", "call before delivery", ""]),
    }


TOOLS = [
    ("get_weather", "Current weather at a place", {"city": "string", "unit": "string"}),
    ("search_orders", "Find orders by customer and time", {"customer": "string", "since": "string", "limit": "integer"}),
    ("create_event", "Put an event into a calendar", {"title": "string", "start": "string", "minutes": "integer"}),
    ("convert_currency", "Convert an amount of money", {"amount": "number", "from": "string", "to": "string"}),
]


def tool(name, description, parameters):
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": properties, "required": list(parameters), "additionalProperties": False}}}


def call(r, name, parameters):
    sample = {"string": lambda: r.choice(CITIES + NAMES), "integer": lambda: r.randint(1, 90),
              "number": lambda: round(r.uniform(1, 500), 2)}
    return {"name": name, "arguments": {key: sample[kind]() for key, kind in parameters.items()}}


def json_text(r):
    parts = [json.dumps(tool(*row), indent=2) for row in TOOLS[:2]]
    parts += [json.dumps(tool(*row)) for row in TOOLS[2:]]
    for number in range(8):
        parts.append(json.dumps(order(r, 4000 + 7 * number), indent=r.choice([2, None])))
        name, _, parameters = r.choice(TOOLS)
        parts.append(json.dumps(call(r, name, parameters)))
    rows = [{"t": i, "city": r.choice(CITIES), "temp_c": round(r.gauss(11, 6), 1), "ok": r.random() < 0.9} for i in range(24)]
    parts += [json.dumps(row) for row in rows]
    return "\n".join(parts) + "\n"


def grouped(n):
    return f"{n:,}"


def digits_text(r):
    out = []
    for _ in range(14):
        a, b = r.randint(100, 99_999), r.randint(100, 99_999)
        out.append(f"{a} + {b} = {a + b}")
        out.append(f"{max(a, b)} - {min(a, b)} = {abs(a - b)}")
        c, d = r.randint(12, 999), r.randint(12, 999)
        out.append(f"{c} × {d} = {c * d}")
        out.append(f"{c * d} / {c} = {d}")
    out.append("\nday         date        sunrise  litres   total")
    total, day = 0, date(2025, 3, 3)
    for i in range(28):
        litres = r.randint(180, 950)
        total += litres
        minutes = 6 * 60 + 58 - 2 * i
        out.append(f"{day:%A}"[:3] + f"         {day}  {minutes // 60:02}:{minutes % 60:02}   {litres:6}  {grouped(total):>7}")
        day += timedelta(1)
    out.append("")
    for _ in range(10):
        price, share = r.randint(20, 4000), r.choice([5, 10, 15, 20, 25, 30])
        out.append(f"A price of {grouped(price * 20)} falls by {share} %: that is {grouped(price * 20 * share // 100)} less, "
                   f"so {grouped(price * 20 * (100 - share) // 100)} remain.")
        start = date(2025, 1, 1) + timedelta(r.randint(0, 300))
        days = r.randint(10, 90)
        out.append(f"From {start} it is {days} days to {start + timedelta(days)}, which is {days // 7} weeks and {days % 7} days.")
    out.append("\n   n      n^2       n^3    2^n")
    for n in range(1, 25):
        out.append(f"{n:4}  {n**2:7}  {n**3:8}  {2**n:9}")
    first, second = 0, 1
    sequence = []
    for _ in range(40):
        sequence.append(str(first))
        first, second = second, first + second
    out.append("\nFibonacci: " + ", ".join(sequence))
    for _ in range(30):
        value, base = r.randint(1000, 65_535), r.choice([2, 8, 16])
        shown = {2: bin, 8: oct, 16: hex}[base](value)
        out.append(f"{value} in base {base} is {shown[2:]}")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    (OUT / "json.txt").write_text(json_text(random.Random(1)), encoding="utf-8")
    (OUT / "digits.txt").write_text(digits_text(random.Random(2)), encoding="utf-8")
