
"use strict";
const page = document.body.dataset;
const written = Number(page.written);
const pill = document.getElementById("state");
const age = document.getElementById("age");

function words(seconds) {
  if (seconds < 90) { return Math.round(seconds) + " s"; }
  if (seconds < 5400) { return Math.round(seconds / 60) + " min"; }
  if (seconds < 172800) { return Math.round(seconds / 3600) + " h"; }
  return Math.round(seconds / 86400) + " days";
}

function look() {
  const seconds = Math.max(0, (Date.now() - written) / 1000);
  if (seconds > Number(page.deserted)) {
    document.body.classList.add("deserted");
    pill.textContent = "no longer refreshed";
    age.textContent = "Not written for " + words(seconds) + ": the training has ended without a word, or its machine is out of reach. The same command resumes it.";
  } else {
    age.textContent = "Written " + words(seconds) + " ago.";
  }
}

if (page.state === "running") {
  look();
  setInterval(look, 1000);
  setTimeout(() => location.reload(), Number(page.every) * 1000);
}
