"use strict";
const $ = id => document.getElementById(id);
let page = null, busy = true, notice = "";

function show(state) {
  const { done, total } = state;
  $("count").textContent = `${done} of ${total}`;
  $("bar").firstElementChild.style.width = `${100 * done / Math.max(1, total)}%`;
  $("bar").setAttribute("aria-valuemax", total); $("bar").setAttribute("aria-valuenow", done);
  page = state.page || null;
  $("done").hidden = !state.finished; $("page").hidden = !page;
  if (!page) return;
  $("question").textContent = state.question;
  $("prompt").textContent = state.prompt;              // text, never markup
  document.body.classList.add("wait");
  const loads = ["left", "right"].map(side => new Promise((ok, no) => {
    const img = $(side); img.onload = ok; img.onerror = no; img.src = state[side];
  }));
  Promise.all(loads).then(() => { document.body.classList.remove("wait"); busy = false; }, () => trouble("A picture did not load; trying again.", () => ask("api/next")));
}

function trouble(text, again) {
  $("trouble").textContent = text; $("trouble").hidden = false;
  setTimeout(again, 1500);
}

// A vote stays in the browser until the server has answered, also if the page is closed meanwhile.
const MARK = "undelivered ";
function keep(body) { try { localStorage.setItem(MARK + body.page, body.choice); } catch (e) { /* private mode: kept by this page only */ } }
function forget(body) { try { localStorage.removeItem(MARK + body.page); } catch (e) { /* as above */ } }
function undelivered() {
  try { return Object.keys(localStorage).filter(k => k.startsWith(MARK)).map(k => ({ page: k.slice(MARK.length), choice: localStorage.getItem(k) })); } catch (e) { return []; }
}

// The same request is repeated until the server answers. It counts a vote once however often it arrives.
async function ask(url, body) {
  busy = true;
  if (body) keep(body);
  try {
    const r = await fetch(url, body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : { cache: "no-store" });
    if (body && r.status === 409) {                      // shown to another voter: two tabs were opened before either had a cookie
      forget(body); notice = "That pair was shown to another tab first, so the vote was not counted. This is your own next pair.";
      return ask("api/next");
    }
    if (!r.ok) throw new Error(r.status);
    const state = await r.json();
    if (body) forget(body);
    $("trouble").textContent = notice; $("trouble").hidden = !notice; notice = ""; document.body.classList.remove("down");
    const [next] = undelivered();
    if (next) return ask("api/vote", next);
    show(state);
  } catch (e) {
    document.body.classList.add("down");
    trouble(body ? "The server does not answer. Your last vote is kept here and sent again, even if you close this page and come back later."
      : "The server does not answer; trying again.", () => ask(url, body));
  }
}

function vote(choice) { if (!busy && page) ask("api/vote", { page, choice }); }

document.addEventListener("click", e => { const b = e.target.closest("[data-choice]"); if (b) { b.blur(); vote(b.dataset.choice); } });
document.addEventListener("keydown", e => {
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey) return;
  const choice = { ArrowLeft: "left", a: "left", A: "left", 1: "left", ArrowRight: "right", b: "right", B: "right", 2: "right", ArrowDown: "same", s: "same", S: "same", 0: "same" }[e.key];
  if (choice) { e.preventDefault(); vote(choice); }
});
ask("api/next");
