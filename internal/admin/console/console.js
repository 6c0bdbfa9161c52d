// Keeps the parts of the page that are marked data-live as the node says they are now.
// Without it the page shows how things stood when it was loaded.
"use strict";
const page = document.querySelector("[data-events]");
if (page) {
  const status = document.getElementById("live-status");
  const source = new EventSource(page.dataset.events);
  source.onopen = () => { status.textContent = "live"; };
  source.onerror = () => { status.textContent = "not live: the node does not answer"; };
  source.onmessage = (event) => {
    const part = document.getElementById(event.lastEventId);
    // Whoever reads or types in a part is not disturbed.
    if (part && !part.contains(document.activeElement)) part.innerHTML = event.data;
  };
  // A page that the browser keeps for "back" must not keep its stream.
  addEventListener("pagehide", () => source.close());
}
