// This room is the first start: it makes what a fresh database lacks, prints
// secrets that are shown once, and says what to type next.
package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"
)

// welcome makes the first management key, unless the environment has one, and
// with OPENAI_API_KEY a first project and token. Both only in a database that
// has none: nothing is ever printed again.
func (p *program) welcome(ctx context.Context, in *instance) error {
	if in.keyMade != "" {
		in.log.Warn("an encryption key was made; keep it apart from the database and its backups", "file", in.keyMade)
	}
	keys, err := in.store.countKeys(ctx)
	if err != nil {
		return fmt.Errorf("counting management keys: %w", err)
	}
	projects, err := in.store.countProjects(ctx)
	if err != nil {
		return fmt.Errorf("counting projects: %w", err)
	}
	base := in.baseURL()
	if keys == 0 && in.cfg.managementToken == nil {
		key, err := in.firstKey(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(p.stdout, "\nThe first management key (role admin). It is shown only now:\n\n  %s\n", key())
		in.showAdminPages(p.stdout, base)
		if in.cfg.openaiKey == nil || projects > 0 {
			fmt.Fprintf(p.stdout, `
Next, make a project with your provider's key, and a token for it:

  export KEY=<the management key>
  curl %[1]s/manage/projects -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \
    -d '{"name":"first","openai_api_key":"sk-..."}'
  curl %[1]s/manage/tokens -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \
    -d '{"project_id":"<id from the answer>","name":"me","expires_in_days":30}'

Clients then use the base URL %[1]s/v1 and the token as their API key.

`, base)
		}
	}
	if in.cfg.openaiKey == nil {
		return nil
	}
	if projects > 0 {
		in.log.Info("OPENAI_API_KEY is not used: the database has projects already")
		return nil
	}
	token, err := in.firstProject(ctx, "default", in.cfg.openaiKey)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, `
The project "default" was made with OPENAI_API_KEY. A token for it, good for 30 days and shown only now:

  %[2]s

Try it:

  curl %[1]s/v1/chat/completions -H "Authorization: Bearer %[2]s" -H "Content-Type: application/json" \
    -d '{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}]}'

`, base, token())
	return nil
}

// showAdminPages says where the first key opens pages, if there are any.
func (in *instance) showAdminPages(w io.Writer, base string) {
	if in.cfg.adminPages {
		fmt.Fprintf(w, "\nSign in with it at %s/admin\n", base)
	}
}

// baseURL is where clients reach this server, as far as it knows.
func (in *instance) baseURL() string {
	if in.cfg.publicURL != nil {
		return in.cfg.publicURL.Scheme + "://" + in.cfg.publicURL.Host
	}
	scheme := "http"
	if in.cfg.tlsCert != "" {
		scheme = "https"
	}
	if in.listener.Addr().Network() == "unix" {
		return scheme + "://localhost" // through the socket: what is in front has another name
	}
	addr := in.listener.Addr().String()
	if ap, err := netip.ParseAddrPort(addr); err == nil && ap.Addr().IsUnspecified() {
		addr = "localhost:" + strconv.Itoa(int(ap.Port()))
	}
	return scheme + "://" + addr
}

func (s *server) firstKey(ctx context.Context) (secret, error) {
	by := systemOrigin(time.Now())
	row := &keyRow{name: "first key", role: string(roleAdmin), createdAt: by.at, updatedAt: by.at}
	value := mintKey(row)
	if err := s.store.addKey(ctx, by, row); err != nil {
		return nil, fmt.Errorf("storing the first management key: %w", err)
	}
	return value, nil
}

// firstProject makes a project with one OpenAI key, and a token for it.
func (s *server) firstProject(ctx context.Context, name string, key secret) (secret, error) {
	now := time.Now()
	project, _, err := s.makeProject(ctx, name, "{}", key, now)
	if err != nil {
		return nil, fmt.Errorf("OPENAI_API_KEY: %w", err)
	}
	token := &tokenRow{projectID: project.id, name: "first token", policy: "{}", createdAt: now.UnixMilli(), updatedAt: now.UnixMilli(),
		expiresAt: new(now.Add(defaultLifetime).UnixMilli())}
	value, err := s.mintToken(ctx, systemOrigin(now), token)
	if err != nil {
		return nil, fmt.Errorf("storing the token: %w", err)
	}
	return value, nil
}

// makeProject makes a project with one upstream, OpenAI with this key.
func (s *server) makeProject(ctx context.Context, name, policy string, key secret, at time.Time) (*projectRow, *upstreamRow, error) {
	ms := at.UnixMilli()
	project := &projectRow{id: newID("proj"), name: name, active: true, policy: policy, routing: "{}", createdAt: ms, updatedAt: ms}
	up := newUpstreamRow(project, ms)
	in := upstreamInput{name: opt[string]{set: true, v: "primary"}, key: opt[secret]{set: true, v: key}}
	if err := in.apply(s, up, true); err != nil {
		return nil, nil, err
	}
	if err := s.store.addProject(ctx, systemOrigin(time.Now()), project, up); err != nil {
		return nil, nil, fmt.Errorf("storing the project: %w", err)
	}
	return project, up, nil
}

// newUpstreamRow returns an upstream of the project, for an upstreamInput to
// fill in.
func newUpstreamRow(p *projectRow, ms int64) *upstreamRow {
	return &upstreamRow{id: newID("up"), project: p.seq, projectID: p.id, weight: 1, models: "[]", rewrite: "{}", settings: "{}", shared: "[]", active: true, createdAt: ms, updatedAt: ms}
}

// pricesOf returns the list prices with the operator's own over them.
func pricesOf(ctx context.Context, st *store) (*priceTable, error) {
	listed, err := loadPrices()
	if err != nil {
		return nil, err
	}
	rows, err := st.listPrices(ctx)
	if err != nil {
		return nil, err
	}
	value := func(p *int64) int64 {
		if p == nil {
			return -1
		}
		return *p
	}
	overrides := make([]priceOverride, 0, len(rows))
	for _, r := range rows {
		overrides = append(overrides, priceOverride{match: r.match, price: price{value(r.input), value(r.cachedInput), value(r.cacheWrite),
			value(r.output), value(r.audioInput), value(r.audioOutput)}})
	}
	return listed.with(overrides), nil
}
