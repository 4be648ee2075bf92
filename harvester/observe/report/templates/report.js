
"use strict";
const step = 50;
const rows = Array.from(document.querySelectorAll("#samples > li[data-outcome]"));
const words = rows.map((row) => row.textContent.toLowerCase());
const search = document.getElementById("search");
const outcome = document.getElementById("outcome");
const further = document.getElementById("further");
const found = document.getElementById("found");
const told = found.textContent;
let room = step;
function show() {
  const wanted = search.value.trim().toLowerCase();
  let matches = 0;
  rows.forEach((row, i) => {
    const fits = (!outcome.value || row.dataset.outcome === outcome.value) && words[i].includes(wanted);
    matches += fits ? 1 : 0;
    row.hidden = !fits || matches > room;
  });
  further.hidden = matches <= room;
  found.textContent = wanted || outcome.value ? matches + " of the " + rows.length + " on this page match" : told;
}
function again() { room = step; show(); }
search.addEventListener("input", again);
outcome.addEventListener("change", again);
further.addEventListener("click", () => { room += step; show(); });
show();
