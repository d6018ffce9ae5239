// Runs once for the timeline: `element` is its root, `trigger` sends an event to the server.
const video = () => document.querySelector("#result video");
const timeline = () => element.querySelector(".tl");

// Events of media do not bubble; the video element comes and goes with each result.
document.addEventListener("timeupdate", (event) => {
  if (event.target === video() && timeline()) {
    timeline().style.setProperty("--now", event.target.currentTime / timeline().dataset.seconds);
  }
}, true);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-person]");
  if (!button) return;
  const {person, action, start, end} = button.dataset;
  let time = video()?.currentTime ?? 0;
  if (start !== undefined) {
    const {left, width} = button.getBoundingClientRect();
    const share = event.detail ? (event.clientX - left) / width : 0;  // 0 of the keyboard: the start
    time = Number(start) + share * (end - start);
    if (video()) {
      video().pause();
      video().currentTime = time;
    }
  }
  element.querySelector("[aria-current]")?.removeAttribute("aria-current");
  button.setAttribute("aria-current", "true");
  trigger("select", {person: Number(person), action: action ? Number(action) : null, time});
});
