// Keeps a page up to date without loading it anew, and gives commands a button that copies them. The page is whole
// without it. What it shows is the page itself, as the service made it: parts whose text has changed are exchanged.
"use strict";
(() => {
  const main = document.getElementById("main");
  let stamp = main.dataset.stamp;
  let busy = false;
  let again = false;

  function copies(root) {
    for (const code of root.querySelectorAll("code.command")) {
      if (!navigator.clipboard || code.nextElementSibling?.matches("button.copy")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "copy";
      button.setAttribute("aria-label", "copy: " + code.textContent);
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
        setTimeout(() => (button.textContent = "copy"), 1500);
      });
      code.after(button);
    }
  }

  // Where the focus is, as the part and the number of the element in it, so that it can be set again.
  function focused(part) {
    const all = [...part.querySelectorAll("a,button,input,select,summary,[tabindex]")];
    return all.indexOf(document.activeElement);
  }

  function bare(part) {
    const copy = part.cloneNode(true);
    for (const gone of copy.querySelectorAll("button.copy")) gone.remove();
    return copy.innerHTML;
  }

  function writes(part) {
    const at = document.activeElement;
    return part.contains(at) && at.matches("input,select,textarea");
  }

  function exchange(old, fresh) {
    const there = fresh.cloneNode(true);
    const place = focused(old);
    const scrolled = [...old.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    old.replaceChildren(...there.childNodes);
    copies(old);
    [...old.querySelectorAll(".scroll")].forEach((box, at) => (box.scrollLeft = scrolled[at] ?? 0));
    if (place >= 0) {
      const all = [...old.querySelectorAll("a,button,input,select,summary,[tabindex]")];
      all[Math.min(place, all.length - 1)]?.focus();
    }
    old.classList.remove("fresh");
    void old.offsetWidth;
    old.classList.add("fresh");
  }

  function parts(root) {
    return new Map([...root.querySelectorAll("[data-live]")].map((part) => [part.dataset.live, part]));
  }

  async function refresh() {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (!answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("main");
      stamp = fresh.dataset.stamp;
      document.title = page.title;
      const ours = parts(main);
      const theirs = parts(fresh);
      if ([...ours.keys()].join() !== [...theirs.keys()].join()) {
        if (!writes(main)) exchange(main, fresh);
        return;
      }
      for (const [name, part] of ours) {
        const now = theirs.get(name);
        if (bare(part) !== now.innerHTML && !writes(part)) exchange(part, now);
      }
    } catch {
      // the service is away for a moment: the stream of events comes back when it does
    } finally {
      busy = false;
      if (again) {
        again = false;
        setTimeout(refresh, 500);
      }
    }
  }

  function progress(told) {
    const line = document.getElementById("under-way");
    if (!line) return;
    line.hidden = told === null;
    if (told === null) return;
    const bar = line.querySelector("progress");
    line.querySelector("[data-part=model] bdi").textContent = told.model;
    line.querySelector("[data-part=stage]").textContent = told.stage;
    line.querySelector("[data-part=count]").textContent = told.done + "/" + told.total;
    bar.max = Math.max(1, told.total);
    bar.value = told.done;
  }

  copies(document);
  if (stamp === undefined) return;
  let stream = null;
  function listen() {
    stream = new EventSource("/events?stamp=" + encodeURIComponent(stamp));
    stream.addEventListener("change", refresh);
    stream.addEventListener("progress", (event) => progress(JSON.parse(event.data)));
    stream.addEventListener("error", () => {
      if (stream.readyState !== EventSource.CLOSED) return;
      setTimeout(listen, 15000); // too many look at once: it asks again later
      setTimeout(refresh, 5000);
    });
  }
  listen();
  addEventListener("pagehide", () => stream.close());
  addEventListener("pageshow", (event) => event.persisted && listen());
})();
