// This room answers the one question that a token may ask about itself: what am
// I, what may I use, what is left. It tells nothing of the project or of other
// tokens, and asking takes nothing from any limit.
package main

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

const ownTokenPath = "/v1/llm-proxy/token"

// An ownToken is what a token is told of itself. Lists are those of its own
// policy; its project's may be narrower.
type ownToken struct {
	Object            string      `json:"object"`
	ID                string      `json:"id"`
	Name              string      `json:"name"`
	ExpiresAt         *stamp      `json:"expires_at"`
	IdleExpiryMinutes *int64      `json:"idle_expiry_minutes"`
	OverlapUntil      *stamp      `json:"overlap_until"` // until then this value of it works: it was rotated
	MaxRequests       *int64      `json:"max_requests"`
	RequestCount      int64       `json:"request_count"`
	RequestsLeft      *int64      `json:"requests_left"`
	Endpoints         []string    `json:"endpoints"` // null: all
	Models            []string    `json:"models"`    // null: all
	Limits            []limitView `json:"limits"`
}

// handleOwnToken answers GET /v1/llm-proxy/token.
func (s *server) handleOwnToken(w http.ResponseWriter, r *http.Request) {
	c := s.newCall(w, r)
	if err := s.identify(c, r); err != nil {
		s.refuse(c, w, r, err)
		return
	}
	defer c.token.running.Add(-1) // not release: to ask is not to use
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", "GET")
		s.refuse(c, w, r, &apiError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", msg: "This URL takes GET."})
		return
	}
	v, err := s.ownToken(c)
	if err != nil {
		s.refuse(c, w, r, errUnavailable("limits_unavailable", err))
		return
	}
	body, err := json.Marshal(v)
	if err != nil {
		s.refuse(c, w, r, err)
		return
	}
	_ = c.controller.SetWriteDeadline(time.Now().Add(writeTimeout))
	h := w.Header()
	c.rates.write(h)
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)+1))
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write(append(body, '\n'))
	s.logOwnToken(c)
}

func (s *server) ownToken(c *call) (*ownToken, error) {
	now := c.start.UnixMilli()
	t, st := c.token, c.state
	v := &ownToken{Object: "llm_proxy.token", ID: st.id, Name: st.name, RequestCount: t.used.Load(), Endpoints: st.policy.Endpoints, Models: st.policy.Models}
	if st.expiresAt != 0 {
		v.ExpiresAt = new(stamp(st.expiresAt))
	}
	if st.idleExpiry != 0 {
		v.IdleExpiryMinutes = new(st.idleExpiry / time.Minute.Milliseconds())
	}
	if c.presented == st.oldHash {
		v.OverlapUntil = new(stamp(st.oldHashUntil))
	}
	if st.maxRequests >= 0 {
		v.MaxRequests, v.RequestsLeft = new(st.maxRequests), new(max(0, st.maxRequests-v.RequestCount))
	}
	l := &t.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := s.adoptLimits(t, now); err != nil {
		return nil, err
	}
	v.Limits = showLimits(t.limits.counters, now)
	c.rates = t.rates(st.maxRequests, now)
	return v, nil
}

func (s *server) logOwnToken(c *call) {
	s.log.Debug("own token", "request_id", c.requestID, "route", "GET "+ownTokenPath, "status", http.StatusOK,
		"token", c.state.id, "project", c.project.id, "address", c.address, "total_us", time.Since(c.start).Microseconds())
}
