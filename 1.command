cd visitas
