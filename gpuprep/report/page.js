"use strict";
/* Strings of the cohort are inserted as text only and never parsed as markup. */
(() => {
  const cohort = JSON.parse(document.getElementById("cohort").textContent);
  const at = Object.fromEntries(cohort.columns.map((name, n) => [name, n]));
  const rows = cohort.rows;
  const PAGE = 50, PRINTED = 1000;
  const STATUSES = ["ok", "fixed", "excluded", "rejected", "failed"];
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== null && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== ""));
    return node;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  const number = (value, digits = 3) => value === null || value === undefined ? "–" :
    String(Number(value.toPrecision(digits))).replace("-", "−");
  const integer = (value) => value === null || value === undefined ? "–" : String(Math.round(value)).replace("-", "−");
  const percent = (value) => value === null || value === undefined ? "–" : number(value * 100, 2) + " %";
  const times = (values, format) => values ? values.map(format).join(" × ") : "–";
  const counted = (count, what) => count.toLocaleString("en") + " " + what + (count === 1 || what === "series" ? "" : "s");
  function sized(bytes) {
    for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
      if (bytes >= size) return number(bytes / size) + " " + unit;
    return bytes + " bytes";
  }

  /* Columns of the table: title, sort key and cell content. */
  const COLUMNS = [
    { title: "Series", key: (r) => r[at.name], cell: seriesCell, kind: "series" },
    { title: "Status", key: (r) => STATUSES.indexOf(r[at.status]), cell: (r) => status(r[at.status]) },
    { title: "Flags", key: (r) => r[at.flags].length || null, cell: (r) => r[at.flags].map(chip), kind: "flags", down: true },
    { title: "Slices", key: (r) => r[at.slices], cell: (r) => integer(r[at.slices]), kind: "number" },
    { title: "Kernel", key: (r) => r[at.kernel], cell: (r) => r[at.kernel] || "–" },
    { title: "Source, mm", key: (r) => r[at.spacing_mm] && r[at.spacing_mm][0], cell: (r) => times(r[at.spacing_mm], (v) => number(v)), kind: "number" },
    { title: "Becomes", key: (r) => r[at.shape] && r[at.shape][0], cell: (r) => times(r[at.shape], String), kind: "number" },
    { title: "HU min, mean, max", key: (r) => r[at.hu_mean], cell: (r) => r[at.hu_mean] === null ? "–" : [r[at.hu_min], r[at.hu_mean], r[at.hu_max]].map(integer).join("\u2002"), kind: "number" },
    { title: "Air peak", key: (r) => r[at.air_hu], cell: (r) => integer(r[at.air_hu]), kind: "number" },
    { title: "Tissue peak", key: (r) => r[at.tissue_hu], cell: (r) => integer(r[at.tissue_hu]), kind: "number" },
    { title: "Padding", key: (r) => r[at.padding_share], cell: (r) => percent(r[at.padding_share]), kind: "number" },
    { title: "Time, s", key: (r) => r[at.seconds], cell: (r) => number(r[at.seconds], 2), kind: "number" },
  ];
  const DISTRIBUTIONS = [
    { title: "Slice spacing", unit: "mm", key: (r) => r[at.spacing_mm] && r[at.spacing_mm][0] },
    { title: "Pixel spacing", unit: "mm", key: (r) => r[at.spacing_mm] && r[at.spacing_mm][1] },
    { title: "Slices", unit: "", key: (r) => r[at.slices] },
    { title: "Air peak", unit: "HU", key: (r) => r[at.air_hu] },
    { title: "Soft tissue peak", unit: "HU", key: (r) => r[at.tissue_hu] },
    { title: "Mean", unit: "HU", key: (r) => r[at.hu_mean] },
    { title: "Padding", unit: "%", key: (r) => r[at.padding_share] === null ? null : r[at.padding_share] * 100 },
    { title: "Time", unit: "s", key: (r) => r[at.seconds] },
  ];

  const status = (name) => make("span", { class: "status " + name }, name);
  const chip = (code) => make("span", { class: "chip" }, code);
  function seriesCell(row) {
    const slash = row[at.name].lastIndexOf("/", row[at.name].lastIndexOf("/") - 1) + 1; /* the last two folder names are emphasised */
    const open = make("button", { type: "button" }, make("small", {}, row[at.name].slice(0, slash)), row[at.name].slice(slash));
    return [open, row[at.number] === null ? null : make("span", { class: "muted" }, " #" + row[at.number]), row[at.reason] ? make("p", {}, row[at.reason]) : null];
  }

  /* State: filters, sort order, rows shown, first row of the page, row of the open dialog. */
  const filters = { text: "", statuses: new Set(), flag: "" };
  let order = { column: null, down: false };
  let shown = rows;
  let first = 0;
  let open = -1;

  const searchTexts = rows.map((r) => [r[at.name], r[at.source], r[at.uid], r[at.status], r[at.reason], r[at.kernel] || "", ...r[at.flags]].join("\n").toLowerCase());
  const numbers = new Map(rows.map((row, n) => [row, n]));

  function select() {
    const parts = filters.text.toLowerCase().split(/\s+/).filter(Boolean);
    shown = rows.filter((row, n) =>
      (!filters.statuses.size || filters.statuses.has(row[at.status])) &&
      (!filters.flag || (filters.flag === "*" ? row[at.flags].length : row[at.flags].includes(filters.flag))) &&
      parts.every((part) => searchTexts[n].includes(part)));
    if (order.column) {
      const { key } = order.column;
      const texts = new Intl.Collator("en", { numeric: true });
      const sign = order.down ? -1 : 1;
      shown = shown.map((row) => [key(row), row]).sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "string" ? texts.compare(a, b) : a - b);
      }).map(([, row]) => row);
    }
    first = 0;
    show();
    showDistributions();
  }

  const detail = (row) => {
    const block = byId("s" + numbers.get(row));
    return block ? JSON.parse(block.textContent) : null; /* null: this part of a long file has not been loaded yet */
  };
  function picture(row) {
    const block = detail(row);
    const placeholder = numbers.get(row) < cohort.pictures ? "no picture" : "not on this page";
    if (block && !block.picture) return make("div", { class: "frame empty" }, placeholder);
    return make("div", { class: "frame" }, block ? image(row, block) : null);
  }
  const image = (row, block) => make("img", { src: "data:image/jpeg;base64," + block.picture, alt: "Middle planes of " + row[at.name] });

  function tableRow(row, n) {
    const cells = COLUMNS.map((column) => make("td", { class: column.kind || null }, column.cell(row)));
    return make("tr", { "data-n": n }, make("td", { class: "picture" }, picture(row)), ...cells);
  }

  function show(count = PAGE) {
    const page = shown.slice(first, first + count);
    const body = document.querySelector("tbody");
    const nothing = make("tr", {}, make("td", { class: "nothing", colspan: COLUMNS.length + 1 }, rows.length ? "No series matches the filters." : "There are no series."));
    body.replaceChildren(...(page.length ? page.map((row, n) => tableRow(row, first + n)) : [nothing]));
    byId("count").value = shown.length === rows.length ? counted(rows.length, "series") : `${shown.length.toLocaleString("en")} of ${counted(rows.length, "series")}`;
    byId("page").textContent = page.length ? `${first + 1} – ${first + page.length} of ${shown.length.toLocaleString("en")}` : "";
    byId("previous").disabled = first === 0;
    byId("next").disabled = first + PAGE >= shown.length;
    byId("pages").hidden = shown.length <= PAGE;
  }
  function turnPage(by) {
    first = Math.max(0, first + by * PAGE);
    show();
    document.querySelector(".scroll").scrollIntoView({ block: "start" });
  }

  function sortBy(column) {
    if (order.column === column) order = order.down === Boolean(column.down) ? { column, down: !order.down } : { column: null, down: false };
    else order = { column, down: Boolean(column.down) };
    for (const [n, th] of [...document.querySelectorAll("thead th[data-n]")].entries()) {
      const own = COLUMNS[n] === order.column;
      if (own) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
      th.querySelector("span").textContent = own ? (order.down ? " ↓" : " ↑") : "";
    }
    select();
  }

  /* Charts. */
  function ticks(low, high, maxTicks) {
    const step = 10 ** Math.floor(Math.log10((high - low) / maxTicks || 1));
    const width = [1, 2, 5, 10].map((n) => n * step).find((w) => (high - low) / w <= maxTicks);
    const found = [];
    for (let v = Math.ceil(low / width) * width; v <= high + width * 1e-6; v += width) found.push(Math.round(v / width) * width);
    return found;
  }
  function distribution({ title, unit, key }) {
    const BINS = 24, H = 46;
    const values = rows.map(key).filter((v) => v !== null);
    const now = shown.map(key).filter((v) => v !== null).sort((a, b) => a - b);
    const median = now.length ? number(now[now.length >> 1]) + (unit && " " + unit) : "–";
    const card = make("figure", { class: "card" }, make("figcaption", { title: "The number in the middle is the median of the series shown" }, title));
    if (!values.length) return card;
    const sorted = values.slice().sort((a, b) => a - b);
    const share = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
    let [low, high] = [share(0), share(1)];
    if (sorted.length > 100) [low, high] = [share(.002), share(.998)]; /* ignore outliers, which would compress the scale */
    const constant = low === high;
    if (constant) [low, high] = [low - .5, high + .5];
    const bin = (v) => Math.max(0, Math.min(BINS - 1, Math.floor((v - low) / (high - low) * BINS)));
    const count = (list) => list.reduce((bins, v) => { bins[bin(v)] += 1; return bins; }, new Array(BINS).fill(0));
    const all = count(values), some = count(now);
    const top = Math.max(...all);
    const chart = draw("svg", { viewBox: `0 0 ${BINS} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": `Distribution of ${title.toLowerCase()}, median ${median}` });
    const height = (n) => n ? Math.max(1.5, Math.sqrt(n / top) * (H - 6)) : 0;
    for (let n = 0; n < BINS; n++) {
      for (const [list, kind] of [[all, "all"], [some, "shown"]])
        if (list[n]) chart.append(draw("rect", { class: kind, x: n + .08, width: .84, y: H - height(list[n]), height: height(list[n]) },
          draw("title", {}, `${number(low + n * (high - low) / BINS)} to ${number(low + (n + 1) * (high - low) / BINS)} ${unit}: ${some[n]} of ${all[n]} series`)));
    }
    card.append(chart, make("p", { class: "ends" }, [constant ? "" : number(low), median, constant ? "" : number(high)].map((text) => make("span", {}, text || "\u00a0"))));
    return card;
  }
  const showDistributions = () => byId("distributions").replaceChildren(...DISTRIBUTIONS.map(distribution));

  const HUES = ["#7aa7c7", "#7fb3a8", "#e0b050", "#5aa9e6", "#c8564b", "#b07aa1", "#a9713f", "#8a8f98"];
  function bins({ steps, parts }) {
    const found = [];
    for (let n = 0; n + 1 < steps.length; n++)
      for (let low = steps[n][0]; low < steps[n + 1][0]; low += steps[n][1]) found.push({ low, width: steps[n][1], part: parts[found.length] });
    return found;
  }
  function histogram(quality, low, high, root, named, label) {
    const W = 520, H = 170, TOP = 46;
    const x = (hu) => (hu - low) / (high - low) * W;
    const inside = bins(quality.histogram).filter((b) => b.low + b.width > low && b.low < high);
    const size = (b) => root ? Math.sqrt(b.part / b.width) : b.part / b.width;
    const top = Math.max(1e-9, ...inside.map(size));
    const chart = draw("svg", { viewBox: `0 0 ${W} ${H + 18}`, role: "img", "aria-label": label });
    const lanes = [];
    for (const [n, band] of cohort.bands.entries()) {
      if (!named.includes(band[0])) continue;
      const left = Math.max(0, x(band[1])), right = Math.min(W, x(band[2] + 1));
      const middle = (left + right) / 2, half = Math.max((right - left) / 2, band[0].length * 3);
      let lane = lanes.findIndex((end) => end < middle - half - 2);
      if (lane < 0) lane = lanes.push(0) - 1;
      lanes[lane] = middle + half;
      const y = 12 + lane * 14;
      chart.append(draw("rect", { x: left, width: right - left, y: TOP, height: H - TOP, fill: HUES[n], opacity: .16 }));
      chart.append(draw("rect", { x: left, width: right - left, y: y + 2, height: 2.5, rx: 1, fill: HUES[n] }));
      chart.append(draw("text", { x: Math.min(Math.max(middle, half), W - half), y, "text-anchor": "middle" }, band[0]));
    }
    for (const b of inside) {
      const left = Math.max(0, x(b.low)), right = Math.min(W, x(b.low + b.width));
      const height = size(b) / top * (H - TOP - 8);
      if (b.part) chart.append(draw("rect", { class: "shown", x: left, width: Math.max(.5, right - left - .3), y: H - height, height },
        draw("title", {}, `${b.low} to ${b.low + b.width} HU: ${number(b.part / 1000, 3)} %`)));
    }
    for (const [hu, name] of [[quality.air_peak_hu, "air"], [quality.tissue_peak_hu, "tissue"]]) {
      if (hu === null || hu < low || hu > high) continue;
      const side = x(hu) > W - 90 ? "end" : "start";
      chart.append(draw("line", { class: "peak", x1: x(hu), x2: x(hu), y1: TOP, y2: H }));
      chart.append(draw("text", { class: "peak-name", x: x(hu) + (side === "end" ? -4 : 4), y: TOP + 8, "text-anchor": side }, `${name} ${integer(hu)}`));
    }
    chart.append(draw("line", { class: "axis", x1: 0, x2: W, y1: H, y2: H }));
    for (const v of ticks(low, high, 8)) {
      const anchor = x(v) < 12 ? "start" : x(v) > W - 12 ? "end" : "middle";
      chart.append(draw("text", { x: x(v), y: H + 13, "text-anchor": anchor }, integer(v)));
    }
    return make("figure", {}, chart, make("figcaption", {}, label));
  }

  /* Details of one series. */
  const pairs = (list) => make("dl", {}, list.filter(([, value]) => value !== null && value !== "" && value !== undefined)
    .map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const section = (title, ...content) => content.length && content.some(Boolean) ? [make("h3", {}, title), ...content.filter(Boolean)] : [];
  const notes = (list) => list && list.length ? make("ul", { class: "notes" }, list.map((text) => make("li", {}, text))) : null;

  function structures(labels) {
    if (!labels || !labels.length) return null;
    return make("ul", { class: "structures" }, labels.map((label, n) => {
      const swatch = make("span", { class: "swatch" });
      const place = label.file.startsWith("masks/") ? n : 0;
      swatch.style.background = `rgb(${cohort.colours[(label.value - 1 + place) % cohort.colours.length].join(",")})`;
      return make("li", {}, swatch, label.name, make("span", { class: "muted" }, ` ${number(label.ml)} ml`));
    }));
  }
  function showDetail(n) {
    const row = shown[n];
    const block = row && detail(row);
    if (!block) return;
    open = n;
    const q = block.quality;
    const dialog = byId("detail");
    const step = (by) => make("button", { type: "button", "aria-label": by < 0 ? "Previous series" : "Next series", disabled: !shown[n + by], onclick: () => showDetail(n + by) }, by < 0 ? "←" : "→");
    const shares = q ? cohort.bands.map(([name, low, high]) => `${name} ${percent(q.bands[name])}`).join(" · ") : null;
    dialog.replaceChildren(
      make("div", { class: "bar" }, make("h2", { id: "title" }, row[at.name]), status(row[at.status]), step(-1), step(1),
        make("button", { type: "button", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
      make("div", { class: "body" },
        block.picture ? make("div", { class: "large" }, image(row, block)) : null,
        structures(block.labels),
        row[at.reason] ? section("Reason", make("p", {}, row[at.reason])) : [],
        section("Flags and irregularities", notes([...block.flags, ...block.irregularities])),
        section("Warnings", notes(block.warnings)),
        q ? section("HU of the source", make("div", { class: "charts" },
          histogram(q, -1024, 1600, true, ["air", "lung", "fat", "bone"], "All HU; heights are square roots of shares"),
          histogram(q, -200, 200, false, ["fat", "water", "blood", "muscle", "liver"], "Soft tissue; heights are shares"))) : [],
        block.facts.length ? section("Acquisition", pairs(block.facts)) : [],
        section("Metrics", pairs([
          ["Bands", shares],
          ["HU", row[at.hu_min] === null ? null : `${integer(row[at.hu_min])} to ${integer(row[at.hu_max])}, mean ${number(row[at.hu_mean])}`],
          ["Clipped by the window", q && q.below_share !== null ? `${percent(q.below_share)} below, ${percent(q.above_share)} above; ${percent(q.clipped_share)} of what is not air` : null],
          ["Padding", row[at.padding_share] === null ? null : percent(row[at.padding_share])],
          ["Source", block.source_shape ? `${times(block.source_shape, String)} voxels of ${times(row[at.spacing_mm], (v) => number(v, 4))} mm` : `${row[at.slices]} slices`],
          ["Cropped", block.crop],
          ["Output", row[at.shape] ? `${times(row[at.shape], String)} voxels of ${times(block.spacing_mm, (v) => number(v, 4))} mm; ${counted(block.files, "file")}, ${sized(block.bytes)}` : null],
          ["Time", row[at.seconds] === null ? null : `${number(row[at.seconds], 3)} s: reading ${number(block.read_s, 2)}, processing ${number(block.process_s, 2)}, writing ${number(block.write_s, 2)}` + (block.masks_s === null ? "" : `, masks ${number(block.masks_s, 2)}`)],
          ["Source folder", row[at.source]],
          ["Series", row[at.uid]],
          ["Finished", block.finished],
        ]))));
    if (!dialog.open) dialog.showModal();
    dialog.focus();
    dialog.scrollTop = 0;
  }

  /* Static parts of the page: summary, filter controls, table header, legend. */
  const counts = Object.fromEntries(STATUSES.map((name) => [name, rows.filter((r) => r[at.status] === name).length]));
  byId("about").textContent = `${counted(rows.length, "series")}: ` +
    STATUSES.filter((s) => counts[s]).map((s) => `${counts[s].toLocaleString("en")} ${s}`).join(", ") +
    ` · ${counted(rows.reduce((sum, r) => sum + r[at.slices], 0), "slice")} in, ${sized(cohort.bytes)} out · ${cohort.made_by}, ${cohort.made}`;
  for (const name of STATUSES.filter((s) => counts[s]))
    byId("statuses").append(make("button", {
      type: "button", "aria-pressed": "false",
      onclick: (event) => {
        const on = !filters.statuses.delete(name);
        if (on) filters.statuses.add(name);
        event.currentTarget.setAttribute("aria-pressed", on);
        select();
      },
    }, status(name), " " + counts[name].toLocaleString("en")));
  const flagged = new Map();
  for (const row of rows) for (const code of row[at.flags]) flagged.set(code, (flagged.get(code) || 0) + 1);
  byId("flag").append(make("option", { value: "" }, "all series"),
    make("option", { value: "*" }, `any flag (${rows.filter((r) => r[at.flags].length).length})`),
    ...[...flagged].sort(([, a], [, b]) => b - a).map(([code, count]) => make("option", { value: code }, `${code} (${count})`)));
  document.querySelector("thead").append(make("tr", {}, make("th", { class: "picture" }, "Middle planes"), ...COLUMNS.map((column, n) =>
    make("th", { scope: "col", class: column.kind === "number" ? "number" : null, "data-n": n },
      make("button", { type: "button", onclick: () => sortBy(column) }, column.title, make("span", {}))))));
  byId("flags").append(...Object.entries(cohort.flags).flatMap(([code, text]) => [make("dt", {}, chip(code)), make("dd", {}, text)]),
    make("dt", {}, "others"), make("dd", {}, "Codes of the audit: why a series was rejected, or what was irregular and put right."));
  byId("bands").append(...cohort.bands.flatMap(([name, low, high]) => [make("dt", {}, name), make("dd", {}, `${integer(low)} to ${integer(high)} HU`)]),
    make("dt", {}, "sources"), make("dd", {}, cohort.sources));

  let waiting = 0;
  byId("text").addEventListener("input", (event) => {
    clearTimeout(waiting);
    filters.text = event.target.value;
    waiting = setTimeout(select, 80);
  });
  byId("flag").addEventListener("change", (event) => { filters.flag = event.target.value; select(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("reset", () => {
    Object.assign(filters, { text: "", flag: "" });
    filters.statuses.clear();
    for (const button of byId("statuses").querySelectorAll("button")) button.setAttribute("aria-pressed", "false");
    select();
  });
  byId("previous").addEventListener("click", () => turnPage(-1));
  byId("next").addEventListener("click", () => turnPage(1));
  document.querySelector("tbody").addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-n]");
    if (row) showDetail(Number(row.dataset.n));
  });
  byId("detail").addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && shown[open + by]) { event.preventDefault(); showDetail(open + by); }
  });
  byId("detail").addEventListener("click", (event) => { if (event.target === event.currentTarget) event.currentTarget.close(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !byId("detail").open && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      byId("text").focus();
    }
  });
  document.addEventListener("DOMContentLoaded", () => show()); /* all pictures are loaded now */
  addEventListener("beforeprint", () => { first = 0; show(PRINTED); });
  addEventListener("afterprint", () => show());
  select();
})();
