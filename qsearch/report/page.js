(() => {
  "use strict";
  const doc = document, all = (q, at = doc) => [...at.querySelectorAll(q)];
  doc.documentElement.classList.add("js");

  // What is pointed at, or tapped, says what it is.
  const tip = doc.createElement("div");
  tip.className = "tip"; tip.hidden = true; doc.body.append(tip);
  const words = new Map();
  for (const title of all("svg.fold title")) {
    words.set(title.parentNode, title.textContent); title.remove();
  }
  const show = e => {
    const text = words.get(e.target);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const x = Math.min(e.clientX + 12, innerWidth - tip.offsetWidth - 8);
    const below = e.clientY + 18 + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = (below ? e.clientY + 18 : e.clientY - tip.offsetHeight - 8) + "px";
  };
  for (const svg of all("svg.fold")) {
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
    svg.addEventListener("click", e => { if (e.target.dataset.find) find(e.target.dataset.find); });
  }

  // All layers: folded by block, searched, sorted.
  const table = doc.getElementById("layers"), box = doc.getElementById("search");
  const count = doc.getElementById("found");
  const groups = table ? all("tbody", table) : [];
  const rows = groups.flatMap(group => all("tr.layer", group));
  const state = () => {
    const text = box.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let seen = 0;
    for (const group of groups) {
      let here = 0;
      const open = group.classList.contains("open") || text.length > 0;
      for (const row of all("tr.layer", group)) {
        const hit = text.every(word => row.dataset.text.includes(word));
        here += hit; row.hidden = !(hit && open);
      }
      const head = group.querySelector("tr.group");
      if (head) head.hidden = here === 0;
      seen += here;
    }
    count.textContent = text.length ? `${seen} of ${rows.length} layers` : `${rows.length} layers`;
  };
  const find = name => {
    const details = table.closest("details");
    if (details) details.open = true;
    box.value = name; state();
    box.scrollIntoView({ block: "center" });
  };
  if (table) {
    box.parentNode.hidden = false;
    box.addEventListener("input", state);
    for (const group of groups) {
      const button = group.querySelector("tr.group button");
      if (button) button.addEventListener("click", () => {
        const open = group.classList.toggle("open");
        button.setAttribute("aria-expanded", open); state();
      });
    }
    all("thead th", table).forEach((head, column) => {
      const button = doc.createElement("button");
      button.append(...head.childNodes); head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "ascending";
        for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "ascending" : "descending");
        const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const number = text => { const n = parseFloat(text); return Number.isNaN(n) ? null : n; };
        const order = (a, b) => {
          const x = number(value(a)), y = number(value(b));
          const c = x !== null && y !== null ? x - y
            : (x === null) - (y === null) || value(a).localeCompare(value(b), "en", { numeric: true });
          return down ? c : -c;
        };
        // Sorting shows layers of all blocks together, so the blocks' lines go.
        const home = groups[0];
        for (const group of groups) { const h = group.querySelector("tr.group"); if (h) h.remove(); }
        home.classList.add("open");
        home.append(...rows.sort(order)); state();
      });
    });
    state();
  }

  // Two pictures on top of each other, with a line to move.
  for (const sample of all(".sheet li")) {
    const tiles = all(".tiles img", sample);
    const full = tiles.find(i => i.dataset.plan === "full precision");
    const ours = tiles.find(i => i.dataset.plan === "plan");
    if (!full || !ours) continue;
    const button = doc.createElement("button");
    button.className = "compare"; button.textContent = "compare with a slider";
    sample.append(button);
    button.addEventListener("click", () => {
      const old = sample.querySelector(".slider");
      if (old) { old.remove(); button.textContent = "compare with a slider"; return; }
      button.textContent = "close the slider";
      const frame = doc.createElement("div"), range = doc.createElement("input");
      frame.className = "slider";
      const [under, over] = [full, ours].map(i => i.cloneNode());
      over.className = "over";
      range.type = "range"; range.min = 0; range.max = 100; range.value = 50;
      range.setAttribute("aria-label", "left of the line the plan, right of it full precision");
      range.addEventListener("input", () => frame.style.setProperty("--cut", range.value + "%"));
      const words = doc.createElement("p");
      words.className = "note"; words.textContent = "left: plan · right: full precision";
      frame.append(under, over, range, words); button.before(frame);
    });
  }
})();
