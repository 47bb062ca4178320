// The page that shows a VM's screen: lets itself in, joins noVNC to our WebSocket, tries again.
//
// The token stands in the address behind the '#', works once, and is taken out of the address at
// once. What it is exchanged for is kept for this tab: reloading works, another browser does not.

import RFB from "/novnc/core/rfb.js";
import { language, words } from "/static/words.js";

const RETRY_MS = 2000;
const NOT_SHOWN = 4001; // as in web/screen.py; the reason says why

const at = location.pathname; // /screen/NAME
const name = decodeURIComponent(at.split("/")[2]);
const kept = `drivebay.secret:${name}`;
const part = (id) => document.getElementById(id);

let rfb = null;

function say(state, text) {
  document.body.dataset.state = state;
  part("state").textContent = text ?? words[state];
}

// Returns the answer; null where the server is gone.
async function ask(body) {
  try {
    return await fetch(`${at}/session`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    return null;
  }
}

async function letIn() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  history.replaceState(null, "", at);
  const answer = await ask({ token });
  if (answer?.ok) sessionStorage.setItem(kept, (await answer.json()).secret);
}

async function show() {
  const secret = sessionStorage.getItem(kept);
  say("connecting");
  const answer = secret === null ? undefined : await ask({ secret });
  if (answer === null) return again("gone");
  if (!answer?.ok) return say("refused");
  const socket = new WebSocket(`ws://${location.host}${at}/socket`,
    ["binary", `drivebay.${secret}`]);
  let closed = null;
  socket.addEventListener("close", (event) => { closed = event; });
  rfb = new RFB(part("screen"), socket, { shared: true });
  rfb.scaleViewport = true;
  rfb.background = "#202020";
  rfb.addEventListener("connect", () => {
    say("shown");
    part("keys").disabled = false;
    rfb.focus();
  });
  rfb.addEventListener("disconnect", () => {
    rfb = null;
    part("keys").disabled = true;
    if (closed?.code === NOT_SHOWN) again("off", closed.reason + words.again);
    else again("ended");
  });
}

function again(state, text) {
  say(state, text);
  setTimeout(show, RETRY_MS);
}

function leaveByKeys() {
  let armed = false;
  const held = (event) => [event.ctrlKey, event.altKey, event.shiftKey];
  window.addEventListener("keydown", (event) => {
    armed = armed || held(event).every(Boolean);
  }, true);
  window.addEventListener("keyup", (event) => {
    if (!armed || held(event).some(Boolean)) return;
    armed = false;
    (rfb === null ? part("full") : part("keys")).focus();
  }, true);
}

function dress() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  document.title = `${name} – Drivebay`;
  part("name").textContent = name;
  part("help").textContent = words.help;
  part("keys").textContent = words.keys;
  part("full").textContent = words.full;
  part("screen").setAttribute("aria-label", words.screen);
  part("keys").addEventListener("click", () => rfb?.sendCtrlAltDel());
  part("full").addEventListener("click", async () => {
    await document.documentElement.requestFullscreen();
    rfb?.focus();
  });
  part("screen").addEventListener("focus", () => rfb?.focus());
  leaveByKeys();
}

dress();
await letIn();
await show();
// A link that is opened in this very tab only changes what is behind the '#'.
window.addEventListener("hashchange", async () => {
  await letIn();
  if (document.body.dataset.state === "refused") await show();
});
