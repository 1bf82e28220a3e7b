/** The frame of the dashboard: sign-in, navigation, and the page that the address names. */

import { Component, html, render, useEffect, useRef, useState } from "./html.js";
import { key, signOut } from "./api.js";
import { link, route } from "./router.js";
import { announcement, ErrorNotice, Icon, Loading } from "./parts/ui.js";
import { ThemeToggle } from "./parts/theme_toggle.js";
import { SignIn } from "./pages/sign_in.js";

/** Pages by the first part of the address. Each is loaded when it is opened first. */
const PAGES = {
  jobs: { title: "Jobs", load: () => import("./pages/jobs.js") },
  job: { load: () => import("./pages/job.js") },
  new: { title: "New job", load: () => import("./pages/new_job.js") },
  compare: { title: "Compare", load: () => import("./pages/compare.js") },
  models: { title: "Models", load: () => import("./pages/models.js") },
  model: { load: () => import("./pages/model.js") },
  playground: { title: "Playground", load: () => import("./pages/playground.js") },
  traffic: { title: "Traffic", load: () => import("./pages/traffic.js") },
  workers: { title: "Workers", load: () => import("./pages/workers.js") },
  usage: { title: "Usage", load: () => import("./pages/usage.js") },
};
const PARENTS = { job: "jobs", model: "models" };

/** Shows the error of a page in its place, so that the navigation remains usable. */
class Guard extends Component {
  componentDidCatch(error) {
    console.error(error);
    this.setState({ error });
  }

  render({ children }, { error }) {
    if (!error) return children;
    const advice = { message: `The page could not be shown: ${error.message}. Reload it.` };
    return html`<${ErrorNotice} error=${advice} onRetry=${() => location.reload()} />`;
  }
}

function Nav({ current, onFollow }) {
  return html`<nav aria-label="Pages">
    <ul>
      ${Object.entries(PAGES)
        .filter(([, page]) => page.title)
        .map(
          ([name, page]) =>
            html`<li key=${name}>
              <a
                href=${link([name])}
                aria-current=${current === name ? "page" : undefined}
                onClick=${onFollow}
                ><${Icon} name=${name} />${page.title}</a
              >
            </li>`,
        )}
    </ul>
  </nav>`;
}

function Sidebar({ current }) {
  const [isOpen, setOpen] = useState(false);
  return html`<header class="sidebar">
    <div class="brand">
      <a href="#/jobs"><span class="brand-mark" aria-hidden="true"></span>Stillhouse</a>
      <button
        type="button"
        class="quiet menu-button"
        aria-expanded=${isOpen ? "true" : "false"}
        aria-controls="menu"
        onClick=${() => setOpen(!isOpen)}
      >
        <${Icon} name="menu" />Menu
      </button>
    </div>
    <div id="menu" class=${isOpen ? "open" : ""}>
      <${Nav} current=${current} onFollow=${() => setOpen(false)} />
      <div class="sidebar-foot">
        <${ThemeToggle} />
        <a class="quiet" href="/openapi.json"><${Icon} name="external" />API description</a>
        <button type="button" class="quiet" onClick=${() => signOut()}>
          <${Icon} name="cancelled" />Sign out
        </button>
      </div>
    </div>
  </header>`;
}

function usePage(name) {
  const [state, setState] = useState({ name: null, Page: null, error: null });
  useEffect(() => {
    let isCurrent = true;
    PAGES[name].load().then(
      (module) => isCurrent && setState({ name, Page: module.default, error: null }),
      () =>
        isCurrent &&
        setState({
          name,
          Page: null,
          error: new Error(
            "This page could not be loaded. The service may have been upgraded; reload.",
          ),
        }),
    );
    return () => {
      isCurrent = false;
    };
  }, [name]);
  return state.name === name ? state : { Page: null, error: null };
}

/** Returns the name of the page: the list for a page that lacks its id, and the jobs by default. */
function pageOf([name, id]) {
  if (!Object.hasOwn(PAGES, name ?? "")) return "jobs";
  return id === undefined ? (PARENTS[name] ?? name) : name;
}

function Frame() {
  const { parts, visit } = route.value;
  const name = pageOf(parts);
  const { Page, error } = usePage(name);
  const main = useRef(null);
  const isFirst = useRef(true);
  useEffect(() => {
    if (Page === null) return;
    const heading = main.current.querySelector("h1");
    document.title = heading ? `${heading.textContent} · Stillhouse` : "Stillhouse";
    if (!isFirst.current) heading?.focus();
    isFirst.current = false;
    scrollTo(0, 0);
  }, [visit, Page]);
  const skip = (event) => {
    event.preventDefault(); // the address after # is the route
    main.current.focus();
  };
  return html`<a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <div class="frame">
      <${Sidebar} current=${PARENTS[name] ?? name} />
      <main id="main" tabindex="-1" ref=${main}>
        <${Guard} key=${visit}>
          ${error && html`<${ErrorNotice} error=${error} onRetry=${() => location.reload()} />`}
          ${Page ? html`<${Page} key=${visit} id=${parts[1]} />` : !error && html`<${Loading} />`}
        <//>
      </main>
    </div>`;
}

function App() {
  return html`${key.value === null ? html`<${SignIn} />` : html`<${Frame} />`}
    <div class="visually-hidden" aria-live="polite">${announcement.value}</div>`;
}

render(html`<${App} />`, document.getElementById("app"));
