"use strict";
// Draws the charts, their switches, and the latents of a report. Everything it needs is in the page.
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text = "", attributes = {}) => Object.assign(document.createElement(tag), { textContent: text }, attributes);

  async function unpacked(id) {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  if (!("DecompressionStream" in window)) {
    $("trouble").hidden = false;
    $("trouble").textContent = "This browser is too old for the charts (it lacks DecompressionStream): any of 2023 or later draws them.";
    return;
  }
  document.head.append(make("script", await unpacked("plotly")));
  const { figures, cards, tips } = JSON.parse(await unpacked("payload"));
  const Plotly = window.Plotly;

  // -- light and dark, paper and screen ----------------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const mouse = matchMedia("(hover: hover)").matches;
  let printing = false;
  const charts = () => [...document.querySelectorAll(".chart.drawn")];

  function theme(layout) {
    const night = dark.matches && !printing;
    const [ink, soft, paper] = night ? ["#e8eaed", "#5b6470", "#1e2329"] : ["#1c2024", "#b5bbc4", "#ffffff"];
    const changes = { "font.color": ink, "hoverlabel.bgcolor": paper, "hoverlabel.font.color": ink, "hoverlabel.bordercolor": soft };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      changes[`${axis}.linecolor`] = changes[`${axis}.dividercolor`] = changes[`${axis}.tickcolor`] = soft;
    }
    return changes;
  }
  const retheme = () => charts().forEach((chart) => Plotly.relayout(chart, theme(chart.layout)));
  dark.addEventListener("change", retheme);
  addEventListener("beforeprint", () => {
    printing = true;
    charts().forEach((chart) => Plotly.relayout(chart, { ...theme(chart.layout), width: 680, autosize: false }));
  });
  addEventListener("afterprint", () => {
    printing = false;
    charts().forEach((chart) => Plotly.relayout(chart, { ...theme(chart.layout), width: null, autosize: true }));
  });

  async function draw(chart, { data, layout }) {
    const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
    const config = { responsive: true, displaylogo: false, displayModeBar: mouse ? "hover" : false, modeBarButtons: buttons, toImageButtonOptions: { filename: chart.dataset.key || "logits", scale: 2 } };
    for (const [key, value] of Object.entries(theme(layout))) {
      const [last, ...path] = key.split(".").reverse();
      path.reverse().reduce((part, name) => (part[name] ??= {}), layout)[last] = value;
    }
    // A finger scrolls the page.
    layout.dragmode = mouse ? "zoom" : false;
    await Plotly.react(chart, data, layout, config);
    chart.classList.add("drawn");
  }

  // -- switches: what `meta` of the traces tells apart -------------------------------------------------------------

  const NAMES = ["penalty", "width", "init", "architecture", "seed", "given"];

  function fieldset(parent, name) {
    const set = make("fieldset");
    set.append(make("legend", name));
    parent.append(set);
    return set;
  }

  function checkbox(parent, text, checked, change, attributes = {}) {
    const label = make("label"), input = make("input", "", { type: "checkbox", checked, ...attributes });
    input.addEventListener("change", () => change(input.checked));
    label.append(input, text);
    parent.append(label);
  }

  // How the vertical axes show one of several counts, where that differs.
  function vertical(chart, count) {
    const axis = chart.layout.meta?.find((each) => each.count === count);
    const own = Object.keys(chart.layout).filter((key) => axis && key.startsWith("yaxis"));
    return Object.fromEntries(own.flatMap((key) => [
      [`${key}.type`, axis.type], [`${key}.tickvals`, axis.tickvals], [`${key}.tickmode`, axis.tickvals ? "array" : "auto"], [`${key}.autorange`, true],
      ...(chart.layout[key].title?.text ? [[`${key}.title.text`, count]] : [])]));
  }

  function switches(chart) {
    const parent = document.querySelector(`.switches[data-for="${chart.dataset.key}"]`);
    const traces = chart.data.filter((trace) => trace.meta);
    if (!traces.length) return;
    const off = {};
    let { count } = (traces.find((trace) => trace.visible !== false) ?? traces[0]).meta;
    const show = () => {
      const visible = chart.data.map((trace) => {
        if (trace.meta) return trace.meta.count === count && !NAMES.some((key) => off[key]?.has(trace.meta[key]));
        const [, kind = "penalty", value] = /^(?:(init|width) )?(.*)$/.exec(String(trace.legendgroup));
        return off[kind]?.has(value) ? "legendonly" : true;
      });
      Plotly.update(chart, { visible }, vertical(chart, count));
    };
    // One of several counts in the place of the others.
    const counts = [...new Set(traces.map((trace) => trace.meta.count))];
    const choice = counts.length > 1 && fieldset(parent, "measure");
    for (const value of choice ? counts : []) {
      const change = () => {
        count = value;
        show();
      };
      checkbox(choice, value, value === count, change, { type: "radio", name: `count-${chart.dataset.key}` });
    }
    for (const name of NAMES) {
      const values = [...new Set(traces.map((trace) => trace.meta[name]))].filter((value) => value !== undefined);
      if (values.length < 2) continue;
      // Of what the first count was not taken of, nothing is turned off.
      const hidden = (value) => {
        const own = traces.filter((trace) => trace.meta[name] === value && trace.meta.count === count);
        return own.length > 0 && own.every((trace) => trace.visible === false);
      };
      off[name] = new Set(values.filter(hidden));
      const set = fieldset(parent, name === "given" ? "beside" : name);
      for (const value of values) {
        checkbox(set, value === "" ? "none" : value, !off[name].has(value), (on) => {
          off[name][on ? "delete" : "add"](value);
          show();
        });
      }
    }
    // Panels share their axes, of which the first of a row or column has the title.
    const fixed = chart.layout.meta ? /^xaxis/ : /^[xy]axis/;
    const axes = Object.keys(chart.layout).filter((key) => fixed.test(key) && chart.layout[key].type === "log");
    const titles = [...new Set(axes.map((axis) => chart.layout[axis].title?.text).filter(Boolean))];
    if (!titles.length) return;
    const set = fieldset(parent, "logarithmic");
    for (const title of titles) {
      const letter = axes.find((axis) => chart.layout[axis].title?.text === title)[0];
      const same = axes.filter((axis) => axis[0] === letter && [title, undefined].includes(chart.layout[axis].title?.text));
      checkbox(set, title.split(":")[0], true, (on) => Plotly.relayout(chart, Object.fromEntries(same.flatMap((axis) => [
        [`${axis}.type`, on ? "log" : "linear"], [`${axis}.tickmode`, on && chart.layout[axis].tickvals ? "array" : "auto"], [`${axis}.autorange`, true]]))));
    }
  }

  // -- the marks of a chart by keyboard ----------------------------------------------------------------------------

  function marks(chart) {
    const found = [], given = (value) => value !== null && value !== undefined && !Number.isNaN(value);
    chart._fullData.forEach(({ type, visible, hoverinfo, x, y, z }, curveNumber) => {
      if (visible !== true || hoverinfo === "skip") return;
      if (type === "heatmap") [...z].forEach((row, i) => [...row].forEach((value, j) => given(value) && found.push({ curveNumber, pointNumber: [i, j] })));
      else [...x].forEach((value, i) => given(value) && given([...y][i]) && found.push({ curveNumber, pointNumber: i }));
    });
    return found;
  }

  function step(chart, key) {
    const found = marks(chart);
    if (!found.length) return;
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    const at = chart.at ?? (key === "ArrowLeft" ? found.length : -1);
    chart.at = Math.min(found.length - 1, Math.max(0, at + moves[key]));
    const { xaxis = "x", yaxis = "y" } = chart._fullData[found[chart.at].curveNumber];
    const { curveNumber, pointNumber } = found[chart.at];
    const [row, column] = [pointNumber].flat();
    Plotly.Fx.hover(chart, column === undefined ? [{ curveNumber, pointNumber }] : { xval: column, yval: row }, xaxis + yaxis);
    // Plotly draws the label in its own time, and emits no event for a hover that it was asked for.
    setTimeout(() => {
      const lines = [...chart.querySelectorAll(".hoverlayer text")].flatMap((text) => text.children.length ? [...text.children] : [text]);
      $("said").textContent = lines.map((line) => line.textContent).join(" ");
    }, 100);
  }

  document.addEventListener("keydown", (event) => {
    const chart = event.target;
    if (!chart.classList?.contains("drawn") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (["ArrowRight", "ArrowLeft", "Home", "End"].includes(event.key)) {
      event.preventDefault();
      step(chart, event.key);
    } else if (event.key === "Enter" && chart.dataset.key === "front" && chart.at !== undefined) {
      const { curveNumber, pointNumber } = marks(chart)[chart.at];
      open(chart.data[curveNumber].customdata[pointNumber].at(-1));
    } else if (event.key === "Escape") Plotly.Fx.unhover(chart);
  });

  // -- latents -----------------------------------------------------------------------------------------------------

  const number = (value) => (value === null ? "–" : value >= 0.0995 || value === 0 ? value.toFixed(2) : value.toPrecision(2));
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)}%`;
  let sae;

  function showSae(i, latent) {
    sae = cards[i];
    $("pick-sae").selectedIndex = i;
    const kinds = [...new Set(sae.label)].filter(Boolean).sort((a, b) => a.length - b.length);
    $("pick-label").replaceChildren(...[["", "all that live"], ...kinds.map((kind) => [kind, kind]), ["-", "no label"], ["dead", "dead"]].map(([value, text]) => make("option", text, { value })));
    $("find").value = "";
    const named = sae.class.findIndex((name, j) => name && sae.live[j]);
    listLatents(latent ?? (named < 0 ? undefined : named));
  }

  function listLatents(latent) {
    const kind = $("pick-label").value, words = $("find").value.trim();
    const found = sae.live.map((_, j) => j).filter((j) => {
      if (j === latent) return true;
      if (kind === "dead" ? sae.live[j] : !sae.live[j]) return false;
      if (kind && kind !== "dead" && (sae.label[j] ?? "-") !== kind) return false;
      return !words || String(j) === words || (sae.class[j] ?? "").includes(words);
    });
    $("count").textContent = `(${found.length})`;
    $("pick-latent").replaceChildren(...found.map((j) => make("option", `${j} · ${sae.class[j] ?? (sae.live[j] ? "no label" : "dead")}${sae.f1[j] === null ? "" : ` · F1 ${number(sae.f1[j])}`}`, { value: j })));
    const chosen = latent ?? found[0];
    $("card").hidden = chosen === undefined;
    $("none").hidden = chosen !== undefined;
    if (chosen === undefined) return undefined;
    $("pick-latent").value = chosen;
    return showLatent(chosen);
  }

  async function showLatent(j) {
    $("latent-name").textContent = `Latent ${j}: ${sae.class[j] ?? (sae.live[j] ? "no label" : "dead")}`;
    const facts = { F1: number(sae.f1[j]), owner: sae.owner[j] ?? "–", purity: number(sae.purity[j]), "fires on": percent(sae.density[j]), "decoder norm": number(sae.norm[j]) };
    $("facts").replaceChildren(...Object.entries(facts).map(([name, value]) => {
      const pair = make("div");
      const word = make("span", name, { className: "word", tabIndex: 0, role: "note", ariaLabel: `${name}: ${tips[name]}` });
      word.dataset.tip = tips[name];
      const term = make("dt");
      term.append(word);
      pair.append(term, make("dd", String(value)));
      return pair;
    }));
    $("cells").tBodies[0].replaceChildren(...sae.cells[j].map(([cell, share, fires]) => {
      const row = make("tr"), middle = make("td"), flex = make("span", "", { className: "share" }), bar = make("span", "", { className: "bar" });
      bar.style.width = `${75 * share}%`;
      flex.append(bar, percent(share));
      middle.append(flex);
      row.append(make("td", cell), middle, make("td", percent(fires), { className: "n" }));
      return row;
    }));
    $("more").hidden = !sae.whole;
    $("less").hidden = sae.whole;
    $("less-id").textContent = sae.id.slice(0, 8);
    if (!sae.whole) return;
    const near = sae.nearest[j].map(([other, cosine, name]) => {
      const item = make("li"), place = cards.findIndex((card) => card.id === sae.narrower);
      const words = `latent ${other}: ${name ?? "no label"}`;
      const button = make("button", words, { type: "button" });
      button.addEventListener("click", () => showSae(place, other));
      item.append(place < 0 ? `${words}, ` : button, `cosine ${cosine.toFixed(2)}`);
      return item;
    });
    $("nearest").replaceChildren(...(near.length ? near : [make("li", "This sweep has no narrower SAE of the same settings.")]));
    const logits = sae.logits[j];
    $("logits-title").hidden = $("chart-logits").hidden = !logits;
    if (!logits) return;
    const layout = structuredClone(figures.logits.layout);
    await draw($("chart-logits"), { data: [{ ...structuredClone(figures.logits.data[0]), x: logits.map((_, token) => token), y: logits }], layout });
  }

  if (cards.length) {
    $("pick-sae").addEventListener("change", (event) => showSae(event.target.selectedIndex));
    $("pick-label").addEventListener("change", () => listLatents());
    $("find").addEventListener("input", () => listLatents());
    $("pick-latent").addEventListener("change", (event) => showLatent(Number(event.target.value)));
    $("browser").addEventListener("submit", (event) => event.preventDefault());
  }

  // A mark of the front opens its SAE.
  function open(id) {
    const place = cards.findIndex((card) => card.id === id);
    if (!id || !$("latents")) return;
    if (place >= 0) showSae(place);
    else $("open-note").textContent = `The latents of ${id.slice(0, 8)} are not in this page: sae-sweep report … --latents ${id.slice(0, 8)} puts them here.`;
    $("open-note").hidden = place >= 0;
    $("latents").scrollIntoView();
  }

  // -- the table ---------------------------------------------------------------------------------------------------

  for (const [column, button] of document.querySelectorAll(".results .sort").entries()) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = head.closest("table").tBodies[0];
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].textContent.replace("k=", "");
      const compare = (a, b) => (Number.isNaN(Number(a)) || Number.isNaN(Number(b)) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b))));
    });
  }

  // -- all of it ---------------------------------------------------------------------------------------------------

  for (const chart of document.querySelectorAll(".chart[data-key]")) {
    await draw(chart, figures[chart.dataset.key]);
    switches(chart);
    // A finger that taps asks for the label.
    if (chart.dataset.key === "front" && mouse) chart.on("plotly_click", ({ points: [point] }) => open(point.customdata?.at(-1)));
  }
  if (cards.length) await showSae(0);
  document.body.dataset.ready = "yes";
})().catch((error) => {
  const trouble = document.getElementById("trouble");
  trouble.hidden = false;
  trouble.textContent = `The charts could not be drawn: ${error.message}`;
  throw error;
});
