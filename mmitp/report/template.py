"""The page's template: plain HTML and CSS in one file, no script, nothing loaded from anywhere."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mmitp">
<title>{{ heading }}</title>
<style>
:root { color-scheme: light dark; --line: #888; --soft: #8883; --mark: #0072b2; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--soft); vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); }
figure { margin: 1.5rem 0; max-width: 40rem; }
figcaption, .note { font-size: .9rem; }
svg.chart { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg .line { fill: none; stroke-width: 1.6; }
svg .grid { stroke: var(--soft); }
svg .target { stroke: currentColor; stroke-width: .8; stroke-dasharray: 1 3; }
svg .span { fill: var(--soft); }
svg.bar { width: 100%; min-width: 4rem; height: .8rem; display: block; }
svg .kept { fill: var(--mark); }
svg .all { fill: none; stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.bars td:nth-child(2), .bars td:nth-child(4) { width: 22%; vertical-align: middle; }
.bars table { width: 100%; }
.bars tbody th { overflow-wrap: anywhere; font-size: .8rem; min-width: 8rem; }
@media (max-width: 34rem) { .bars :is(th, td):nth-child(4) { display: none; } }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .8rem; }
</style>
</head>
<body>
{% macro show(table) %}
{% if table.rows %}
<div class="scroll" tabindex="0" role="group" aria-label="{{ table.title }}">
<table>
<thead><tr>{% for cell in table.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% endmacro %}
<h1>{{ heading }}</h1>
<nav aria-label="Sections"><a href="#overview">Overview</a><a href="#course">Course</a>{% if channels %}<a href="#channels">Channels</a>{% endif %}<a href="#tests">Tests</a>{% if pictures %}<a href="#detections">Detections</a>{% endif %}<a href="#cost">Cost</a><a href="#configs">Configs</a><a href="#commands">Commands</a></nav>
{% for remark in remarks %}
<p class="note">{{ remark }}.</p>
{% endfor %}
<h2 id="overview">Overview</h2>
{{ show(overview) }}
{% if timed %}<p class="note">{{ timed }}</p>{% endif %}
<h2 id="course">Course of the training</h2>
{% for caption, chart in charts %}
<figure>{{ chart }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if channels %}
<h2 id="channels">Channels kept</h2>
{% for run, rows in channels %}
<h3>{{ run.name }}</h3>
<div class="scroll bars" tabindex="0" role="group" aria-label="Channels kept, {{ run.name }}">
<table>
<thead><tr><th scope="col">layer</th><th scope="col">input channels</th><th scope="col">kept</th><th scope="col">operations</th><th scope="col">kept</th></tr></thead>
<tbody>
{% for name, inputs, kept, macs, share in rows %}
<tr><th scope="row">{{ name }}</th><td>{{ inputs }}</td><td>{{ kept }}</td><td>{{ macs }}</td><td>{{ share }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
{% endif %}
<h2 id="tests">Tests</h2>
{{ show(tests) }}
{% if pictures %}
<h2 id="detections">Detections</h2>
{% for name, sample in pictures %}
<h3>{{ name }}</h3>
{% if sample is string %}
<p class="note">No picture: {{ sample }}.</p>
{% else %}
<figure><img src="data:image/jpeg;base64,{{ sample.jpeg }}" alt="Ground truth and detections of {{ name }}"><figcaption>Ground truth on the left, detections on the right: {{ sample.title }}.</figcaption></figure>
{% endif %}
{% endfor %}
{% endif %}
<h2 id="cost">Training cost</h2>
{{ show(cost) }}
<h2 id="configs">Configs</h2>
{% for name, text in configs %}
<details><summary>{{ name }}</summary><pre tabindex="0">{{ text }}</pre></details>
{% endfor %}
<h2 id="commands">Commands and versions</h2>
{{ show(commands) }}
</body>
</html>
"""  # noqa: E501  lines of HTML
