// What /manage tells about the health of upstreams.
package main

import "time"

type healthView struct {
	State   string `json:"state"`
	Reason  string `json:"reason"`
	Since   *stamp `json:"since"`
	Until   *stamp `json:"until"`
	Running int64  `json:"running"`
}

func (s *server) showHealth(u *upstreamRow) healthView {
	h := s.health.of(u.seq, u.id).row(time.Now().UnixMilli())
	v := healthView{State: h.state.String(), Reason: h.reason, Running: h.running}
	if h.state != keyReady {
		v.Since, v.Until = new(stamp(h.changedAt)), new(stamp(h.until))
	}
	return v
}
