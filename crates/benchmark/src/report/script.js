"use strict";
// The overview's search box: hides rows whose text lacks a word of the query.
const box = document.getElementById("search");
const rows = Array.from(document.querySelectorAll("#overview tbody tr"));
const count = document.getElementById("shown");
function filter() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = (row.textContent + " " + row.dataset.words).toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += row.hidden ? 0 : 1;
  }
  count.textContent = shown + " of " + rows.length;
}
if (box) {
  document.getElementById("finder").hidden = false;
  box.addEventListener("input", filter);
  filter();
}
