// The handler of /manage that tries a route: which upstream would get a call.
package main

import "time"

type routeView struct {
	Model         string          `json:"model"`
	API           string          `json:"api"`
	FallbackModel string          `json:"fallback_model"` // "": none
	Upstreams     []routeLineView `json:"upstreams"`
}

type routeLineView struct {
	UpstreamID string  `json:"upstream_id"`
	Name       string  `json:"name"`
	Priority   int64   `json:"priority"`
	Weight     int64   `json:"weight"`
	SentModel  string  `json:"sent_model"` // as the upstream knows the model
	Share      float64 `json:"share"`      // of the calls, now
	Why        string  `json:"why"`
	// How long a call waits there, as far as its own settings say.
	ConnectMS    int64 `json:"connect_ms"`
	AnswerMS     int64 `json:"answer_ms"`
	FirstEventMS int64 `json:"first_event_ms"`
	IdleMS       int64 `json:"idle_ms"`
}

// tryRoute says which upstream of a project would get a call for a model now,
// and why. It calls nobody.
func (s *server) tryRoute(r *manageRequest) (*reply, error) {
	if err := r.only("model", "api"); err != nil {
		return nil, err
	}
	p, err := s.store.projectByID(r.ctx, r.path("id"))
	if err != nil {
		return nil, err
	}
	v := routeView{Model: r.query.Get("model"), API: r.query.Get("api"), Upstreams: []routeLineView{}}
	w := wish{api: apiOpenAI, model: v.Model, now: time.Now().UnixMilli()}
	switch v.API {
	case "", "openai":
		v.API = "openai"
	case "anthropic":
		w.api = apiAnthropic
	default:
		return nil, badRequest("invalid_value", "api", "api must be openai or anthropic.")
	}
	if err := checkModelName("model", v.Model); err != nil {
		return nil, err
	}
	st, err := s.registry.readProject(r.ctx, p.seq)
	if err != nil {
		return nil, err
	}
	v.FallbackModel = st.routing.fallback(v.Model)
	for _, l := range st.explain(&w) {
		u := l.upstream
		v.Upstreams = append(v.Upstreams, routeLineView{u.id, u.name, u.priority, u.weight, u.named(v.Model), l.share, l.why,
			u.settings.ConnectMS, u.settings.AnswerMS, u.settings.FirstEventMS, u.settings.IdleMS})
	}
	return &reply{body: v}, nil
}
