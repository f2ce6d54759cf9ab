"""The report's page, as Jinja2 fills it: nothing is loaded from elsewhere."""

from __future__ import annotations

PAGE = """{% macro grid(name, columns, rows) %}<div class="wide"><table id="{{ name }}"><thead><tr>
{% for column in columns %}<th scope="col"><button type="button">{{ column }}</button></th>{% endfor %}
</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td data-sort="{{ cell.sort }}">{{ cell.text }}
{%- if cell.more %} <small>{{ cell.more }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2430; --faint: #5d6675; --line: #d9dee6; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181f; --ink: #e4e8ee; --faint: #9aa4b2; --line: #323a46; --card: #1b212a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; } p, .note { color: var(--faint); margin: .3rem 0 .8rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 22rem)), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; margin: 0;
  min-width: 0; }
.card h3 { font-size: .95rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.card svg { max-width: 100%; height: auto; display: block; margin: 0 auto; }
.strip { display: grid; grid-template-columns: 3.6rem 1fr; align-items: center; gap: .3rem; margin: .25rem 0;
  font-size: .8rem; color: var(--faint); }
.strip img { width: 100%; height: auto; display: block; border-radius: 4px; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--card); position: sticky; top: 0; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .text { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25b4"; }
th[aria-sort=descending] button::after { content: " \\25be"; }
small { color: var(--faint); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ done }} of {{ total }} cells; {{ models }} model{{ "" if models == 1 else "s" }}. {{ intervals }}</p>
{% for line in warnings %}<p>{{ line }}.</p>{% endfor %}

<h2>Quality against cost</h2>
<div class="figures" style="--least: {{ "22rem" if figures | length == 3 else "27rem" }}">
{% for heading, svg in figures %}<figure class="card"><h3>{{ heading }}</h3>{{ svg | safe }}</figure>
{% endfor %}</div>

{% if spreads %}<h2>How sure it is</h2>
<p>Standard deviations between trainings and between draws of one training, and 95 % intervals over both.</p>
{{ grid("spreads", spread_columns, spreads) }}{% endif %}
{% if differences %}<h2>Between models</h2>
<p>The second less the first, with 95 % intervals over trainings (Welch); where an interval holds 0, the difference
may be chance. Each is judged for itself: of twenty that are nothing, one lies outside.</p>
{{ grid("differences", difference_columns, differences) }}{% endif %}

{% if strips %}<h2>Samples</h2>
<p>The same seeds{{ " and prompts" if shown else "" }} everywhere, evenly from all over those that were judged, of the
first training seed and draw.{% if shown %} They are of: {{ shown }}.{% endif %}</p>
<div class="figures">
{% for label, rows in strips %}<div class="card"><h3>{{ label }}</h3>
{% for steps, data in rows %}<div class="strip"><span>{{ steps }} step{{ "" if steps == 1 else "s" }}</span>
<img alt="samples of {{ label }}, {{ steps }} steps" src="data:image/webp;base64,{{ data }}"></div>
{% endfor %}</div>
{% endfor %}</div>{% endif %}

<h2>All cells</h2>
<p>A heading sorts by its column.</p>
{{ grid("cells", columns, rows) }}

<h2>Protocol</h2>
{% for name, fields in protocols %}<h3>{{ name }}</h3>
<dl>{% for field, value in fields %}<dt>{{ field }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endfor %}
<p>{{ footer }}</p>
<script>
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[place].dataset.sort;
    const compare = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "") ;
      const order = isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
</script>
</body>
</html>
"""
