"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows;
  const card = document.getElementById("card");
  const status = document.getElementById("status");
  const round = (v) => (v === null ? "–" : Number(v.toPrecision(4)).toString().replace("-", "−"));
  // Built as nodes: text stays text, and the policy of the page allows no style attributes.
  const make = (tag, kind, ...children) => {
    const node = document.createElement(tag);
    if (kind) node.className = kind;
    node.append(...children);
    return node;
  };

  // Average ranks, then Pearson: the same rule as lmcl.metrics, for the filtered images.
  const ranks = (values) => {
    const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]);
    const found = new Array(values.length);
    for (let i = 0; i < order.length; ) {
      let j = i;
      while (j + 1 < order.length && values[order[j + 1]] === values[order[i]]) j++;
      for (let k = i; k <= j; k++) found[order[k]] = (i + j) / 2;
      i = j + 1;
    }
    return found;
  };
  const pearson = (x, y) => {
    const n = x.length, mx = x.reduce((a, b) => a + b, 0) / n, my = y.reduce((a, b) => a + b, 0) / n;
    let xy = 0, xx = 0, yy = 0;
    for (let i = 0; i < n; i++) { xy += (x[i] - mx) * (y[i] - my); xx += (x[i] - mx) ** 2; yy += (y[i] - my) ** 2; }
    return xx > 0 && yy > 0 ? xy / Math.sqrt(xx * yy) : null;
  };

  let filter = null;
  const passes = (row) => !filter || filter.every(([key, value]) => String(row[key]) === value);
  const apply = () => {
    document.querySelectorAll("[data-filter]").forEach((b) =>
      b.setAttribute("aria-pressed", String(JSON.stringify(filter) === b.dataset.filter)));
    document.querySelectorAll("circle.p, .shot").forEach((e) =>
      e.classList.toggle("off", !passes(rows[e.dataset.i])));
    const kept = rows.filter((r) => passes(r) && r.mos !== null && r.prediction !== null);
    const value = kept.length > 1 ? pearson(ranks(kept.map((r) => r.prediction)), ranks(kept.map((r) => r.mos))) : null;
    const name = filter ? filter.map((f) => f[1]).join(", level ") : "All images";
    if (status) status.textContent = `${name}: ${kept.length} scored images, SRCC ${value === null ? "not defined" : value.toFixed(3)}` + (filter ? ". Click again to clear." : "");
  };
  document.querySelectorAll("[data-filter]").forEach((b) => b.addEventListener("click", () => {
    filter = JSON.stringify(filter) === b.dataset.filter ? null : JSON.parse(b.dataset.filter);
    apply();
  }));

  let pinned = false;
  const mark = (i) => {
    document.querySelectorAll("circle.at").forEach((c) => c.classList.remove("at"));
    if (i !== null) document.querySelectorAll(`circle.p[data-i="${i}"]`).forEach((c) => c.classList.add("at"));
  };
  const show = (i, x, y) => {
    const r = rows[i], thumb = data.thumbs[r.id];
    const parts = [];
    if (thumb) {
      const image = make("img");
      image.alt = "";
      image.src = `data:image/jpeg;base64,${thumb}`;
      parts.push(make("div", "pic show-box", image));
    }
    if (thumb && r.box) {
      const box = make("span", "salient");
      ["left", "top", "width", "height"].forEach((side, k) => { box.style[side] = `${r.box[k]}%`; });
      parts[0].append(box);
    }
    const kind = [r.subset, r.distortion, r.level >= 0 ? `level ${r.level}` : ""].filter(Boolean).join(", ");
    const spread = r.std === null ? "" : ` ± ${round(r.std)}`;
    parts.push(make("p", "", r.path), make("p", "", kind), make("p", "",
      "score ", make("b", "", round(r.mos)), `${spread}, prediction `, make("b", "", round(r.prediction))));
    card.replaceChildren(...parts);
    card.hidden = false;
    const w = card.offsetWidth, h = card.offsetHeight;
    card.style.left = `${Math.max(8, x + 18 + w > innerWidth ? x - w - 18 : x + 18)}px`;
    card.style.top = `${Math.max(8, Math.min(y - h / 2, innerHeight - h - 8))}px`;
    mark(i);
  };
  const hide = () => { if (!pinned) { card.hidden = true; mark(null); } };
  const nearest = (svg, event) => {
    // In the drawing's own units, so that one pass over attributes is enough.
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = 22 * 22;
    for (const c of svg.querySelectorAll("circle.p:not(.off)")) {
      const d = (c.cx.baseVal.value - at.x) ** 2 + (c.cy.baseVal.value - at.y) ** 2;
      if (d < least) { least = d; best = c; }
    }
    return best;
  };
  document.querySelectorAll("svg.points").forEach((svg) => {
    svg.addEventListener("pointermove", (e) => {
      if (pinned) return;
      const c = nearest(svg, e);
      if (c) show(Number(c.dataset.i), e.clientX, e.clientY); else hide();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("click", (e) => {
      const c = nearest(svg, e);
      pinned = false;
      if (c) { show(Number(c.dataset.i), e.clientX, e.clientY); pinned = true; card.classList.add("pinned"); } else hide();
      e.stopPropagation();
    });
  });
  const release = () => { pinned = false; card.classList.remove("pinned"); hide(); };
  document.addEventListener("click", release);
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") release(); });

  document.querySelectorAll("input[data-show]").forEach((box) => {
    const set = () => document.body.classList.toggle(box.dataset.show, box.checked);
    box.addEventListener("change", set);
    set();
  });
  apply();
})();
