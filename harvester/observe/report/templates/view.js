
"use strict";
const overview = document.getElementById("overview");
const list = document.getElementById("samples");
const search = document.getElementById("search");
const outcome = document.getElementById("outcome");
const further = document.getElementById("further");
const found = document.getElementById("found");
const asOf = document.getElementById("as-of");
const told = found.textContent;
const fair = Array.from(list.children);
let before = "";
let cursor = "";
let asked = 0;
let matches = 0;

function parsed(html) {
  const body = new DOMParser().parseFromString(html, "text/html").body;
  return Array.from(body.childNodes).map((node) => document.adoptNode(node));
}

async function get(path) {
  const reply = await fetch(path, { cache: "no-store" });
  if (!reply.ok) { throw new Error(await reply.text()); }
  return reply.json();
}

async function refresh() {
  try {
    const news = await get("overview");
    document.body.classList.remove("stale");
    asOf.textContent = "as of " + news.at;
    if (news.html !== before) {
      before = news.html;
      const open = Array.from(overview.querySelectorAll("details")).map((one) => one.open);
      overview.replaceChildren(...parsed(news.html));
      overview.querySelectorAll("details").forEach((one, i) => { one.open = Boolean(open[i]); });
    }
  } catch (error) {
    document.body.classList.add("stale");
    asOf.textContent = "not refreshed: " + (error.message || "the view has ended");
  }
  setTimeout(refresh, document.hidden ? 10000 : 2000);
}

async function look(more) {
  const ticket = ++asked;
  const text = search.value.trim();
  if (!text && !outcome.value) {
    list.replaceChildren(...fair);
    further.hidden = true;
    found.textContent = told;
    return;
  }
  const wanted = new URLSearchParams({ q: text, outcome: outcome.value, after: more ? cursor : "" });
  try {
    const page = await get("samples?" + wanted);
    if (ticket !== asked) { return; }
    matches = (more ? matches : 0) + page.count;
    if (more) { list.append(...(page.count ? parsed(page.html) : [])); } else { list.replaceChildren(...parsed(page.html)); }
    cursor = page.cursor;
    further.hidden = !cursor;
    found.textContent = matches + (cursor ? " found so far" : " found in the whole store");
  } catch (error) {
    found.textContent = "the search failed: " + error.message;
  }
}

let soon = 0;
search.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(() => look(false), 200); });
outcome.addEventListener("change", () => look(false));
further.addEventListener("click", () => look(true));
setTimeout(refresh, 1000);
